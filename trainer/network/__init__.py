"""The network under DeepSpeed: built, packed, adapted, optimized, sharded."""
