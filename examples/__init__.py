"""Examples, and what the benchmarks share with them. Run from the root: `python -m examples.demo`."""
