"""Measurements that others can repeat; see README.md beside this file."""
