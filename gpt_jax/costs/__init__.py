"""What a compiled program costs, on this machine's devices or on absent ones."""
