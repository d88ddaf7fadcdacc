// Which sources this library was built from.
#include "cloister_kernels.h"

extern "C" CL_EXPORT const char *cl_sources(void);

// SHA-256, in hex, as CMakeLists.txt and kernels/native/place.py make it.
const char *cl_sources(void) { return CL_SOURCES; }
