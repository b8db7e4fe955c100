"""The tables and plots of the README and of docs/, from the JSON under benchmarks/results/."""
