"""The parts of a sweep: its jobs, the launchers that run the jobs, and the results of the jobs."""
