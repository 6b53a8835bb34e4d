"""Fewer and cheaper kernels: passes over the graph before autograd."""
