"""HTTP in front of the protocols: who may call, what is too much, how bodies are read."""
