"""Synthetic datasets in the file formats of the benchmarks."""
