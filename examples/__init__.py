"""Examples; the benchmarks use them too. Run from the root: `python -m examples.demo`."""
