"""Process groups, launching workers, and sharded tensors."""
