"""Benchmarks, run as modules from the repository's root: `python -m benchmarks.kernels.prune_cpu`.

baselines: what Cropr is compared with. kernels: single ops. models: whole networks. accuracy: what pruning costs.
report: tables and plots from results/*.json. A file imports from its own folder or from those to its left in: utils,
baselines, kernels, models, accuracy, report; a script is imported by no other.
"""
