"""Composing a config, checking it against signatures, and building objects from it."""
