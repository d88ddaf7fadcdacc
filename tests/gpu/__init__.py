"""What only a CUDA device shows; collected where there is one."""
