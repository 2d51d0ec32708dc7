"""What a training stores to resume from, and how it finds that again."""
