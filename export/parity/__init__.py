"""Parity: the exported graph against the torch model."""
