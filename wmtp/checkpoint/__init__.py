"""Checkpoints: training states on disk."""
