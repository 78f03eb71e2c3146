"""Benchmarks: `make bench`. Each figure is a median of several runs in one go, beside its baseline of the same go."""
