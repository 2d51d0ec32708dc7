"""`python -m benchmarks.scoring`: token sequences to rewards, next to padded batches and vLLM."""
