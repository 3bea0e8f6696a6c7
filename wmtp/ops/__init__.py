"""Functions of tensors that compute cross-entropies, targets, returns and sums of metrics."""
