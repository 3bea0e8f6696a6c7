"""Models of Hugging Face's transformers; the only package that imports transformers."""
