"""`python -m benchmarks.training`: optimizer steps, next to a padded loop."""
