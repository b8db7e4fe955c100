"""Common parts of the benchmarks: result files, timing, plots."""
