/* A stand-in for libnvidia-ml.so.1 with NVML's structures and return codes: two devices, one of them sliced.
   NVML_FAILS names a function that returns NVML_ERROR_UNKNOWN (999). With NVML_UNPRIVILEGED the sliced device's
   memory is not told, as NVML tells it to privileged users only; with NVML_EMPTY it has no slice. */
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int gpu, memory; } utilization_t;
typedef struct device { const char *uuid, *name; unsigned long long total, free; int whole; } device_t;

static device_t devices[] = {
    {"GPU-aaaa", "Example H200", 150ull << 30, 149ull << 30, 1},
    {"GPU-bbbb", "Example A100", 80ull << 30, 79ull << 30, 1},
};
static device_t slice = {"MIG-cccc", "Example A100 MIG 3g.40gb", 40ull << 30, 39ull << 30, 0};
static int is_open = 0;

static int failing(const char *name) {
    const char *wanted = getenv("NVML_FAILS");
    return wanted && strcmp(wanted, name) == 0;
}
#define ANSWER if (failing(__func__)) return 999; if (!is_open) return 1 /* NVML_ERROR_UNINITIALIZED */
static int put(char *out, unsigned int length, const char *text) {
    if (length < strlen(text) + 1) return 7; /* NVML_ERROR_INSUFFICIENT_SIZE */
    strcpy(out, text);
    return 0;
}

const char *nvmlErrorString(int code) { return code == 3 ? "Not Supported" : "Unknown Error"; }
int nvmlInit_v2(void) { if (failing(__func__)) return 9; is_open = 1; return 0; }
int nvmlShutdown(void) { ANSWER; is_open = 0; return 0; }
int nvmlSystemGetDriverVersion(char *out, unsigned int n) { ANSWER; return put(out, n, "575.01"); }
int nvmlDeviceGetCount_v2(unsigned int *count) { ANSWER; *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int i, device_t **d) { ANSWER; *d = &devices[i]; return 0; }
int nvmlDeviceGetName(device_t *d, char *out, unsigned int n) { ANSWER; return put(out, n, d->name); }
int nvmlDeviceGetUUID(device_t *d, char *out, unsigned int n) { ANSWER; return put(out, n, d->uuid); }
int nvmlDeviceGetMemoryInfo(device_t *d, memory_t *m) {
    ANSWER; if (d == &devices[1] && getenv("NVML_UNPRIVILEGED")) return 4; /* NVML_ERROR_NO_PERMISSION */
    m->total = d->total; m->free = d->free; m->used = d->total - d->free; return 0;
}
int nvmlDeviceGetCudaComputeCapability(device_t *d, int *major, int *minor) {
    ANSWER; if (!d->whole) return 3; *major = d == devices ? 9 : 8; *minor = 0; return 0;
}
int nvmlDeviceGetTemperature(device_t *d, int sensor, unsigned int *t) {
    ANSWER; if (!d->whole || sensor != 0) return 3; *t = 41; return 0;
}
int nvmlDeviceGetUtilizationRates(device_t *d, utilization_t *u) {
    ANSWER; if (d != devices) return 3; u->gpu = 17; u->memory = 5; return 0;
}
int nvmlDeviceGetMigMode(device_t *d, unsigned int *current, unsigned int *pending) {
    ANSWER; if (d == devices) return 3; *current = *pending = 1; return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(device_t *d, unsigned int *count) { ANSWER; (void)d; *count = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(device_t *d, unsigned int i, device_t **out) {
    ANSWER; (void)d; if (i != 2 || getenv("NVML_EMPTY")) return i ? 6 : 2; /* NVML_ERROR_NOT_FOUND, _INVALID_ARGUMENT */
    *out = &slice; return 0;
}
