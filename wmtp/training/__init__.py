"""The training loop and everything that a training run consists of."""
