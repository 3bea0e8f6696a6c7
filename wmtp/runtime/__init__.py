"""Handle files, locks, run folders, processes, signals and background threads on the local machine."""
