"""Measurements that others can repeat; README.md says how."""
