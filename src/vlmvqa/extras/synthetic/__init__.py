"""Generators of small synthetic datasets in the file formats of the benchmarks."""
