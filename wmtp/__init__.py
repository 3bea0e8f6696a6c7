"""Weighted multi-token prediction."""
