"""Text generation with a key-value cache, sampling and self-speculation."""
