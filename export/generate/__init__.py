"""Text from a bundle: the decoder loop, sampling, chat, and transformers' generate."""
