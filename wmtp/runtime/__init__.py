"""The machine: devices, folders, signals, randomness."""
