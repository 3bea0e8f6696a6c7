"""Upload the checkpoints and other files of a run to an S3 bucket, and download them from there."""
