"""The cut: weights without the pruned structures, and the remaining weights refitted."""
