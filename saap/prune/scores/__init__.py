"""Scores: how important each coupled structure is."""
