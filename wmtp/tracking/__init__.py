"""Trackers: console, metrics.jsonl and MLflow."""
