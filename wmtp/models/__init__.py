"""Multi-token models: architectures, sources of weights, loading and export."""
