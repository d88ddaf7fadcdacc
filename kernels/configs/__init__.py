"""Tables of kernel configurations, one per device: see `kernels.triton.configs`."""
