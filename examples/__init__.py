"""Examples that run on a CPU; `demo` is what `make demo` runs."""
