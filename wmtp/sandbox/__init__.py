"""Grading of untrusted programs, which were written by a language model, in isolated processes."""
