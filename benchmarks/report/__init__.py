"""Tables and plots of the README and docs/, and CSV files, from the JSON under
benchmarks/results/."""
