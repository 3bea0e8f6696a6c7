"""The command line: from arguments to a job and its exit code."""
