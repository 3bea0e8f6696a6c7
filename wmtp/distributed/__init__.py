"""Start the processes of a run, communicate between them, and shard tensors over them."""
