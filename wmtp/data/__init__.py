"""Data sets, which consist of records, the tokens of the records, and batches."""
