"""Token ids to raw scores: every shared prefix is computed once."""
