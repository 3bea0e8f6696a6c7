"""Services of the local machine: files, locks, run folders, processes, signals, and background threads."""
