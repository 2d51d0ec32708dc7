"""What a reward model says about held-out comparisons: metrics, RewardBench, the best step."""
