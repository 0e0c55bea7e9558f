/* A stand-in for NVIDIA's libnvidia-ml.so.1: one GPU whose power curve is known.
 *
 * It draws STANDIN_IDLE_W watts always, and STANDIN_BUSY_W watts more for every CPU second of the
 * calling process. A thread updates its sensors every STANDIN_TICK_MS milliseconds, as the real
 * ones are. More settings:
 *   STANDIN_SENSES       share of each tick, at its end, that the sensors see
 *   STANDIN_NO_COUNTER   only the power reading is there
 *   STANDIN_NO_POWER     neither is
 *   STANDIN_WARMING      degrees Celsius per second
 *   STANDIN_STRANGERS    so many other processes are listed
 *   STANDIN_HIDDEN       this process is listed under an id of another namespace
 *   STANDIN_EMPTY_CALLS  so many lists of processes are empty at first
 * GPU memory is the process's resident memory. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} process_info;

typedef struct {
    unsigned version;
    int sensor, celsius;
} temperature;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static double shown_mj, shown_mw, started_s;
static int running, gpu;

static double setting(const char *name, double otherwise) {
    const char *text = getenv(name);
    return text ? atof(text) : otherwise;
}

static double seconds(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* The truth: not part of NVML. */
double standin_energy_mj(void) {
    double wall = seconds(CLOCK_MONOTONIC) - started_s;
    double busy = seconds(CLOCK_PROCESS_CPUTIME_ID);
    return 1e3 * (setting("STANDIN_IDLE_W", 10) * wall + setting("STANDIN_BUSY_W", 200) * busy);
}

/* A model that takes so much of this thread's CPU time. */
void standin_spin(double cpu_s) {
    double end = seconds(CLOCK_THREAD_CPUTIME_ID) + cpu_s;
    while (seconds(CLOCK_THREAD_CPUTIME_ID) < end) continue;
}

static void wait_until(double moment) {
    struct timespec t = {(time_t)moment, (long)((moment - (time_t)moment) * 1e9)};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

static void *update(void *unused) {
    double tick = setting("STANDIN_TICK_MS", 100) / 1e3, share = setting("STANDIN_SENSES", 1);
    double end = seconds(CLOCK_MONOTONIC);
    for (;;) {
        double before = seconds(CLOCK_MONOTONIC);
        wait_until(end + tick * (1 - share));
        double from = seconds(CLOCK_MONOTONIC), from_mj = standin_energy_mj();
        end += tick;
        wait_until(end);
        double now = seconds(CLOCK_MONOTONIC), power = (standin_energy_mj() - from_mj) / (now - from);
        pthread_mutex_lock(&lock);
        shown_mw = power;
        shown_mj += power * (now - before);
        pthread_mutex_unlock(&lock);
        /* After a stall no missed tick is made up for. */
        if (now > end + tick) end = now;
    }
    return unused;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (!running) {
        pthread_t thread;
        running = 1;
        started_s = seconds(CLOCK_MONOTONIC);
        pthread_create(&thread, NULL, update, NULL);
    }
    return SUCCESS;
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) {
    return code == NOT_SUPPORTED ? "Not Supported" : code == NOT_FOUND ? "Not Found" : "Error";
}

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    snprintf(text, size, "1.2.3");
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = 1;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = &gpu;
    return index == 0 ? SUCCESS : INVALID;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    *handle = &gpu;
    return strcmp(uuid, "GPU-0-1") ? NOT_FOUND : SUCCESS;
}

int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
    (void)handle;
    snprintf(text, size, "Stand-in");
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *mj) {
    (void)handle;
    if (getenv("STANDIN_NO_COUNTER") || getenv("STANDIN_NO_POWER")) return NOT_SUPPORTED;
    pthread_mutex_lock(&lock);
    *mj = (unsigned long long)shown_mj;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *mw) {
    (void)handle;
    if (getenv("STANDIN_NO_POWER")) return NOT_SUPPORTED;
    pthread_mutex_lock(&lock);
    *mw = (unsigned)shown_mw;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) {
    (void)handle, (void)sensor;
    *celsius = 40 + (unsigned)(setting("STANDIN_WARMING", 0) * (seconds(CLOCK_MONOTONIC) - started_s));
    return SUCCESS;
}

/* These two are what the library zeus asks for. */
int nvmlDeviceGetArchitecture(void *handle, unsigned *architecture) {
    (void)handle;
    *architecture = 5;
    return SUCCESS;
}

int nvmlDeviceGetTemperatureV(void *handle, temperature *told) {
    return nvmlDeviceGetTemperature(handle, told->sensor, (unsigned *)&told->celsius);
}

static unsigned long long resident_bytes(void) {
    unsigned long long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (file) {
        if (fscanf(file, "%*u %llu", &pages) != 1) pages = 0;
        fclose(file);
    }
    return pages * (unsigned long long)sysconf(_SC_PAGESIZE);
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, process_info *list) {
    static int calls;
    unsigned listed = 1 + (unsigned)setting("STANDIN_STRANGERS", 0), room = *count;
    (void)handle;
    if (calls++ < setting("STANDIN_EMPTY_CALLS", 0)) listed = 0;
    *count = listed;
    if (!listed) return SUCCESS;
    if (!list || room < listed) return INSUFFICIENT_SIZE;
    /* Ids above any that Linux gives. */
    for (unsigned i = 0; i < listed; i++) list[i] = (process_info){1u << 23 | i, 1 << 20, 0, 0};
    if (!getenv("STANDIN_HIDDEN")) list[0].pid = (unsigned)getpid();
    list[0].used = resident_bytes();
    return SUCCESS;
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, process_info *list) {
    (void)handle, (void)list;
    *count = 0;
    return SUCCESS;
}
