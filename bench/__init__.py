"""Measuring bundles: speed, memory, and whether the number can be believed."""
