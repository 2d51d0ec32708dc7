"""What people write by themselves: servers to compare with."""
