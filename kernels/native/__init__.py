"""The CPU kernels in C++, and what binds them: the library, the backend, programs of whole steps."""
