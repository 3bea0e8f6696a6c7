"""Many jobs of one command: which, where they run, what became of them."""
