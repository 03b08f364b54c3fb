/*
 * A double of NVIDIA's management library for tests: its C interface as far as the gateway calls it, with answers from
 * the text file that the environment variable NVML_DOUBLE_STATE names. The file is read at each call, so that a test
 * changes GPUs while the gateway runs; it must be replaced as a whole (by a rename).
 *
 *   gpu uuid=GPU-a name=Big_one total=24576 used=500 reserved=100 util=7 temp=40 power=55000 clock=1980 memclock=2619 ecc=0
 *   part of=GPU-a uuid=MIG-a total=4864 used=10 reserved=0
 *   process on=GPU-a pid=77 mib=8000 kind=C
 *   xid n=1 on=GPU-a code=79
 *
 * Sizes in MiB; `_` stands for a space in names. A gpu with `lost=1` has fallen off the bus, with `unified=1` it has no
 * memory of its own, with `divided=1` its parts are listed. A process with `mib=-1` does not tell its memory. An xid is
 * delivered once, in the order of `n`.
 */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, NO_DRIVER = 9, TIMED_OUT = 10, LOST = 15 };
enum { XID_EVENT = 8, NO_INSTANCE = -1 };

typedef void *device_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_t;
typedef struct { unsigned gpu, memory; } utilization_t;
typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } process_t;
typedef struct { device_t device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } event_t;

typedef struct {
    char uuid[96], name[96], parent[96];
    long long total, used, reserved, util, temp, power, clock, memclock, ecc;
    int lost, unified, divided;
} gpu_t;
typedef struct { char on[96]; long long pid, mib; char kind; } user_t;
typedef struct { char on[96]; long long n, code; } xid_t;

typedef struct {
    gpu_t gpus[64];
    user_t users[256];
    xid_t xids[256];
    int gpu_count, user_count, xid_count;
} state_t;

static long long delivered;

static void set_number(const char *line, const char *key, long long *value) {
    char wanted[32];
    snprintf(wanted, sizeof wanted, " %s=", key);
    const char *found = strstr(line, wanted);
    if (found) *value = atoll(found + strlen(wanted));
}

static void set_text(const char *line, const char *key, char *value, size_t size) {
    char wanted[32];
    snprintf(wanted, sizeof wanted, " %s=", key);
    const char *found = strstr(line, wanted);
    if (!found) return;
    found += strlen(wanted);
    size_t length = strcspn(found, " \n");
    if (length >= size) length = size - 1;
    memcpy(value, found, length);
    value[length] = 0;
}

static void read_gpu(gpu_t *gpu, const char *line) {
    long long lost = 0, unified = 0, divided = 0;
    gpu->util = gpu->temp = gpu->power = gpu->clock = gpu->memclock = gpu->ecc = -1;
    set_text(line, "uuid", gpu->uuid, sizeof gpu->uuid);
    set_text(line, "name", gpu->name, sizeof gpu->name);
    set_text(line, "of", gpu->parent, sizeof gpu->parent);
    for (char *at = gpu->name; *at; at++)
        if (*at == '_') *at = ' ';
    set_number(line, "total", &gpu->total);
    set_number(line, "used", &gpu->used);
    set_number(line, "reserved", &gpu->reserved);
    set_number(line, "util", &gpu->util);
    set_number(line, "temp", &gpu->temp);
    set_number(line, "power", &gpu->power);
    set_number(line, "clock", &gpu->clock);
    set_number(line, "memclock", &gpu->memclock);
    set_number(line, "ecc", &gpu->ecc);
    set_number(line, "lost", &lost);
    set_number(line, "unified", &unified);
    set_number(line, "divided", &divided);
    gpu->lost = lost, gpu->unified = unified, gpu->divided = divided;
}

/* Not kept: each call sees what the file says then. */
static state_t *look(void) {
    static __thread state_t state;
    memset(&state, 0, sizeof state);
    const char *path = getenv("NVML_DOUBLE_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return NULL;
    char line[512];
    while (fgets(line, sizeof line, file)) {
        if ((!strncmp(line, "gpu ", 4) || !strncmp(line, "part ", 5)) && state.gpu_count < 64) {
            read_gpu(&state.gpus[state.gpu_count++], line);
        } else if (!strncmp(line, "process ", 8) && state.user_count < 256) {
            user_t *user = &state.users[state.user_count++];
            char kind[4] = "C";
            set_text(line, "on", user->on, sizeof user->on);
            set_text(line, "kind", kind, sizeof kind);
            set_number(line, "pid", &user->pid);
            set_number(line, "mib", &user->mib);
            user->kind = kind[0];
        } else if (!strncmp(line, "xid ", 4) && state.xid_count < 256) {
            xid_t *xid = &state.xids[state.xid_count++];
            set_text(line, "on", xid->on, sizeof xid->on);
            set_number(line, "n", &xid->n);
            set_number(line, "code", &xid->code);
        }
    }
    fclose(file);
    return &state;
}

/* A handle is a place in the file, from 1. */
static gpu_t *gpu_of(device_t device) {
    state_t *state = look();
    long place = (long)device;
    if (!state || place < 1 || place > state->gpu_count) return NULL;
    return &state->gpus[place - 1];
}

/* The n-th GPU, or the n-th part of one. */
static int nth(const char *parent, unsigned n, device_t *device) {
    state_t *state = look();
    if (!state) return NO_DRIVER;
    for (int place = 0; place < state->gpu_count; place++)
        if (!strcmp(state->gpus[place].parent, parent) && n-- == 0) {
            if (state->gpus[place].lost) return LOST;
            *device = (device_t)(long)(place + 1);
            return OK;
        }
    return NOT_FOUND;
}

static long long newest_xid(void) {
    state_t *state = look();
    long long newest = 0;
    for (int place = 0; state && place < state->xid_count; place++)
        if (state->xids[place].n > newest) newest = state->xids[place].n;
    return newest;
}

int nvmlInit_v2(void) {
    if (!look()) return NO_DRIVER;
    delivered = newest_xid();
    return OK;
}

int nvmlShutdown(void) { return OK; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    snprintf(version, length, "570.86.15");
    return OK;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    state_t *state = look();
    if (!state) return NO_DRIVER;
    *count = 0;
    for (int place = 0; place < state->gpu_count; place++) *count += !state->gpus[place].parent[0];
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device) { return nth("", index, device); }

static int text(device_t device, char *value, unsigned length, size_t member) {
    gpu_t *gpu = gpu_of(device);
    if (!gpu) return INVALID;
    if (gpu->lost) return LOST;
    snprintf(value, length, "%s", (char *)gpu + member);
    return OK;
}

int nvmlDeviceGetUUID(device_t device, char *uuid, unsigned length) {
    return text(device, uuid, length, offsetof(gpu_t, uuid));
}

int nvmlDeviceGetName(device_t device, char *name, unsigned length) {
    return text(device, name, length, offsetof(gpu_t, name));
}

int nvmlDeviceGetMemoryInfo_v2(device_t device, memory_t *memory) {
    gpu_t *gpu = gpu_of(device);
    if (!gpu) return INVALID;
    if (gpu->lost) return LOST;
    if (gpu->unified) return UNSUPPORTED;
    memory->total = (unsigned long long)gpu->total << 20;
    memory->used = (unsigned long long)gpu->used << 20;
    memory->reserved = (unsigned long long)gpu->reserved << 20;
    memory->free = (unsigned long long)(gpu->total - gpu->used - gpu->reserved) << 20;
    return OK;
}

static int processes(device_t device, char kind, unsigned *count, process_t *infos) {
    gpu_t *gpu = gpu_of(device);
    if (!gpu) return INVALID;
    if (gpu->lost) return LOST;
    char uuid[96];
    memcpy(uuid, gpu->uuid, sizeof uuid);
    state_t *state = look();
    unsigned room = *count, found = 0;
    for (int place = 0; state && place < state->user_count; place++) {
        user_t *user = &state->users[place];
        if (strcmp(user->on, uuid) || user->kind != kind) continue;
        if (infos && found < room) {
            infos[found].pid = user->pid;
            infos[found].bytes = user->mib < 0 ? ~0ULL : (unsigned long long)user->mib << 20;
            infos[found].gpu_instance = infos[found].compute_instance = NO_INSTANCE;
        }
        found++;
    }
    *count = found;
    return found > room ? TOO_SMALL : OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device_t device, unsigned *count, process_t *infos) {
    return processes(device, 'C', count, infos);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(device_t device, unsigned *count, process_t *infos) {
    return processes(device, 'G', count, infos);
}

/* What a GPU does not tell, it does not support. */
static int number(device_t device, size_t member, unsigned *value) {
    gpu_t *gpu = gpu_of(device);
    if (!gpu) return INVALID;
    if (gpu->lost) return LOST;
    long long found = *(long long *)((char *)gpu + member);
    if (found < 0) return UNSUPPORTED;
    *value = found;
    return OK;
}

int nvmlDeviceGetUtilizationRates(device_t device, utilization_t *rates) {
    rates->memory = 0;
    return number(device, offsetof(gpu_t, util), &rates->gpu);
}

int nvmlDeviceGetTemperature(device_t device, int sensor, unsigned *temperature) {
    return sensor ? INVALID : number(device, offsetof(gpu_t, temp), temperature);
}

int nvmlDeviceGetPowerUsage(device_t device, unsigned *milliwatts) {
    return number(device, offsetof(gpu_t, power), milliwatts);
}

int nvmlDeviceGetClockInfo(device_t device, int type, unsigned *mhz) {
    if (type == 0) return number(device, offsetof(gpu_t, clock), mhz);
    return type == 2 ? number(device, offsetof(gpu_t, memclock), mhz) : UNSUPPORTED;
}

int nvmlDeviceGetTotalEccErrors(device_t device, int type, int counter, unsigned long long *errors) {
    unsigned found = 0;
    int outcome = type == 1 && counter == 0 ? number(device, offsetof(gpu_t, ecc), &found) : UNSUPPORTED;
    *errors = found;
    return outcome;
}

int nvmlDeviceGetMigMode(device_t device, unsigned *current, unsigned *pending) {
    gpu_t *gpu = gpu_of(device);
    if (!gpu) return INVALID;
    if (gpu->parent[0]) return UNSUPPORTED;
    *current = *pending = gpu->divided;
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(device_t device, unsigned *count) {
    (void)device;
    *count = 7;
    return OK;
}

int nvmlDeviceGetMigDeviceHandleByIndex(device_t device, unsigned index, device_t *part) {
    gpu_t *gpu = gpu_of(device);
    if (!gpu) return INVALID;
    char uuid[96];
    memcpy(uuid, gpu->uuid, sizeof uuid);
    return nth(uuid, index, part);
}

int nvmlEventSetCreate(void **set) {
    *set = malloc(1);
    return OK;
}

int nvmlEventSetFree(void *set) {
    free(set);
    return OK;
}

int nvmlDeviceRegisterEvents(device_t device, unsigned long long types, void *set) {
    (void)set;
    gpu_t *gpu = gpu_of(device);
    if (!gpu) return INVALID;
    return types == XID_EVENT ? OK : UNSUPPORTED;
}

int nvmlEventSetWait_v2(void *set, event_t *event, unsigned timeout_ms) {
    (void)set;
    const unsigned pause_ms = 10;
    for (unsigned waited = 0;; waited += pause_ms) {
        state_t *state = look();
        xid_t *next = NULL;
        for (int place = 0; state && place < state->xid_count; place++) {
            xid_t *xid = &state->xids[place];
            if (xid->n > delivered && (!next || xid->n < next->n)) next = xid;
        }
        if (next) {
            delivered = next->n;
            memset(event, 0, sizeof *event);
            event->type = XID_EVENT;
            event->data = next->code;
            for (int place = 0; place < state->gpu_count; place++)
                if (!strcmp(state->gpus[place].uuid, next->on)) event->device = (device_t)(long)(place + 1);
            return OK;
        }
        if (waited >= timeout_ms) return TIMED_OUT;
        struct timespec pause = {0, pause_ms * 1000000L};
        nanosleep(&pause, NULL);
    }
}
