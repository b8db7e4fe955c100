"""Single ops: speed, resources of the compiled kernels, and the floor that the hardware sets."""
