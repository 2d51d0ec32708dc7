"""Wire protocols: each turns a client's request into groups and scores into the client's reply."""
