"""What computing with torch stands on: devices, precision, processes, memory of GPUs."""
