"""Multi-token models: their architectures, the sources of their weights, and their loading and export."""
