"""Composition of configs, checks against constructor signatures, and construction of objects from configs."""
