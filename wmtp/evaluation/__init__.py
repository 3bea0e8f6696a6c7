"""Evaluation of a trained model: it measures how many of the model's programs pass, and how well it predicts."""
