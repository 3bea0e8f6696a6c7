"""Algorithms: the weight of each target."""
