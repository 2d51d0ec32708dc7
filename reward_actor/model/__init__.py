"""A directory to a reward model: whose it is, its weights, its contract."""
