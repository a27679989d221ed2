"""Pruning: score the coupled structures of a model, choose what to keep, cut it out."""
