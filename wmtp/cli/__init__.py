"""Command line: from the arguments of a process to a job and its exit code."""
