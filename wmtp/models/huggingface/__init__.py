"""Models of Hugging Face's transformers library. Only this package imports transformers directly."""
