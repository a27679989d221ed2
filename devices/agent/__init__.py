"""The board's side of a remote run. Standard library only."""
