"""One check of the CUDA path: `python -m bench.gpu` (check.py)."""
