"""Quality: perplexity, agreement with the dense model, and zero-shot tasks."""
