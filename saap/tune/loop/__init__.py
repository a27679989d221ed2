"""The training loop: steps, state on disk, and processes."""
