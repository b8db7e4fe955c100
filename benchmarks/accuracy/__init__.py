"""Accuracy under pruning: agreement with the unpruned network, and task accuracy after training."""
