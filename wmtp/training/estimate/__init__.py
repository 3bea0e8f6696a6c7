"""Estimates of the memory and the time of training runs."""
