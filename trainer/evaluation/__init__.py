"""What a reward model says about held-out comparisons."""
