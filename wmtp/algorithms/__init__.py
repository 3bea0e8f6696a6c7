"""Algorithms, which compute the weight of each target in the loss."""
