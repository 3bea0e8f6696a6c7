"""Objectives: the loss and the metrics of a batch."""
