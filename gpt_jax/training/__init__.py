"""The optimizer, the training step, the loop, and resuming."""
