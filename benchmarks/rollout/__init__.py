"""Rollouts: sampling and scoring overlapped, what carries the scores, more actors, new weights."""
