"""From preferences to an exported reward model: Ray Train workers under DeepSpeed ZeRO."""
