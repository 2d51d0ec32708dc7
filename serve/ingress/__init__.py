"""The side that callers meet: groups in, token ids out to the replicas, rewards back."""
