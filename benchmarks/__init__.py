"""Benchmarks, run as modules from the repository's root: `python -m benchmarks.kernels.prune_cpu`.

baselines: methods that Cropr is compared with. kernels: single ops. models: speed and memory of
networks. accuracy: agreement and task accuracy. report: tables and plots from results/*.json. A
file imports from its folder or from those to its left in: utils, baselines, kernels, models,
accuracy, report; no file imports a script.
"""
