"""The GGUF target: one file for llama.cpp."""
