"""Measurements beside peers, one file a question; each writes JSON to benchmarks/results/."""
