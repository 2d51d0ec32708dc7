"""The reward service: an ingress that speaks HTTP and a reward model that scores token ids."""
