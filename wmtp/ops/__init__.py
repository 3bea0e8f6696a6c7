"""Pure tensor functions: cross entropy, targets, returns, metric sums."""
