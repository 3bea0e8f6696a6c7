"""Judging programs that a language model wrote, without trusting them."""
