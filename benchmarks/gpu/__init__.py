"""What a GPU is measured by, and what is known about it without one."""
