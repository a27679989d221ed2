"""Energy from a board's sensors."""
