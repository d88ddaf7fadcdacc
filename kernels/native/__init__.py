"""The native CPU kernels: a C++ library built for several instruction sets, and the backend that runs it."""
