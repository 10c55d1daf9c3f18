"""What a run takes of the machine: devices, precision, processes."""
