"""`python -m benchmarks.serving`: requests to rewards, next to vLLM and plain Ray Serve."""
