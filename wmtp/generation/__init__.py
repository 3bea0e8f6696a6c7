"""Text generation: decoding with a key-value cache, sampling, self-speculation."""
