"""Trackers that write the metrics of a run to the console, to metrics.jsonl and to MLflow."""
