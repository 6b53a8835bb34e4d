"""Less memory: activations (a pass over the joint graph) and optimizer state (run time)."""
