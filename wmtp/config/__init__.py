"""Config: composition, checks against constructor signatures, and the objects built from it."""
