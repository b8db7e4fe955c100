"""What pruning costs: agreement with the unpruned network, and accuracy after training."""
