"""Triton kernels. Each file: the jit functions of one idea, and the launcher that maps records to them."""
