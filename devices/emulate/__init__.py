"""An emulated aarch64 CPU."""
