"""The ground for computing with torch: devices, precision, processes, memory of GPUs."""
