"""The command line of the package. A command checks its arguments, runs a job, and ends with an exit code."""
