"""Checkpoints and files of a run in an S3 bucket."""
