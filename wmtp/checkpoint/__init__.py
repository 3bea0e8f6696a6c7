"""Write, verify and read checkpoints. A checkpoint is a training state on disk."""
