"""Models: names, families, checkpoints and the walk through their layers."""
