"""CUDA kernels in Triton, one file a family: the jitted kernels and the launchers the dispatcher
calls.

They know tensors, not models. Launchers take the arguments of the schemas in csrc/library.h, and
check them. With ``TRITON_INTERPRET=1`` they run on CPU tensors.
"""
