/* A CUDA driver without a device, for tests: it takes every module and counts every start.
   Triton's C modules find in it what they call; the test appends functions that do nothing for all other names. */
#include <string.h>

int started;

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 10 ? 32 : 232448; /* warp size; shared memory and whatever else is asked */
  return 0;
}

int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return 0;
}

int cuCtxGetCurrent(void **context) {
  *context = &started;
  return 0;
}

/* CUDA_ERROR_INVALID_IMAGE for what is no ELF file */
int cuModuleLoadData(void **module, const void *image) {
  *module = &started;
  return memcmp(image, "\177ELF", 4) == 0 ? 0 : 200;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = &started;
  return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0; /* most threads of a block */
  return 0;
}

int cuGetErrorString(int error, const char **text) {
  *text = "the test's driver refuses";
  return 0;
}

int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  ++started;
  return 0;
}
