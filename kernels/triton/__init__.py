"""Kernels in Triton for CUDA devices: one file per family, proven in the interpreter and by compiling to cubin."""
