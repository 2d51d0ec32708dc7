"""Preferences to comparisons of token ids, and to the micro-batches of a step."""
