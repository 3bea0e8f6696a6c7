"""Grade untrusted programs, written by a language model, in isolated processes."""
