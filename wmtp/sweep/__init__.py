"""Sweeps: the jobs of a sweep, the launchers that run them, and their results."""
