"""Derived data: a model's weights as the kernels want them, made once by engine-prepare, read by workers."""
