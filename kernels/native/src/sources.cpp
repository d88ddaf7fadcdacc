// Which sources this library was built from.
#include "cloister_kernels.h"

const char *cl_sources(void) { return CL_SOURCES; }
