"""Data sets: records, their tokens, and batches."""
