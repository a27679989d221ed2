"""What every part stands on: errors, files, memory, precision and signals."""
