"""The settings of a training, and what of them does not fit together. pydantic only."""
