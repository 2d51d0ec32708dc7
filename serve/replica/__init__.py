"""The side that has the device: token ids in, raw scores out. No Ray."""
