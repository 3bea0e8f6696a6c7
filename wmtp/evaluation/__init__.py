"""Evaluation of a trained model: pass@k of its programs, losses and accuracies."""
