"""Composition of configs, checks of config values against constructor signatures, and construction of objects."""
