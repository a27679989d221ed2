"""What a model is: names, families, checkpoints and the walk through its layers."""
