"""Less memory for activations: passes over the joint graph."""
