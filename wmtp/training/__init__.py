"""The training loop and the other parts of a training run."""
