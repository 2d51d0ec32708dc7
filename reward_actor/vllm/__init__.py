"""Scoring through vLLM, for models that need several GPUs."""
