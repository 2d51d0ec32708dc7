"""What the service reports of itself: metrics, request lines, live rewards."""
