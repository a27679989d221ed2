"""Group adapters: what is trained beside the integers."""
