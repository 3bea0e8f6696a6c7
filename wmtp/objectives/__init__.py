"""Objectives, which compute the loss and the metrics of a batch."""
