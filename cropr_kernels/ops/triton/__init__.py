"""CUDA kernels in Triton, one file per family: the jitted kernels and the launchers the dispatcher calls.

They know tensors, not models. With ``TRITON_INTERPRET=1`` the launchers run on CPU tensors.
"""
