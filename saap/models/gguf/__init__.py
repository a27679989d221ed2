"""GGUF files as model directories."""
