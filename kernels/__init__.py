"""Fused tensor operations behind one protocol: a torch reference, a CPU backend, and what a GPU needs."""
