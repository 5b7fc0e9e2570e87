/* The library as Python sees it: choose an instruction set, run a job on the threads of torch's own OpenMP pool. */
#include "job.h"

#if defined(_WIN32)
#define NM_EXPORT __declspec(dllexport)
#else
#define NM_EXPORT __attribute__((visibility("default")))
#endif

#define NM_VERSION 6

typedef void (*parallel_fn)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

typedef struct {
    const nm_job *job;
    const nm_isa *isa;
    int64_t tasks, scratch, next, workers;
    int error;
} team;

static const nm_isa *isa_of(int64_t number) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi")
                   && __builtin_cpu_supports("bmi2");
    const int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                   && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
    if (number == 2) return v4 ? &nm_avx512 : 0;
    if (number == 1) return v3 ? &nm_avx2 : 0;
    return &nm_portable;
#else
    return number == 0 ? &nm_portable : 0;
#endif
}

/* Tasks are taken in turn: which worker runs one changes nothing in its result. */
static void work(void *shared) {
    team *t = shared;
    const int64_t me = __atomic_fetch_add(&t->workers, 1, __ATOMIC_RELAXED);
    char *room = t->job->scratch + me * t->scratch;
    for (;;) {
        const int64_t task = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
        if (task >= t->tasks) return;
        const int error = t->isa->run(t->job, task, room);
        if (error) __atomic_store_n(&t->error, error, __ATOMIC_RELAXED);
    }
}

NM_EXPORT int64_t nm_version(void) { return NM_VERSION; }
NM_EXPORT int64_t nm_job_bytes(void) { return sizeof(nm_job); }

/* 0 portable, 1 AVX2, 2 AVX-512; NULL where the processor has it not */
NM_EXPORT const char *nm_isa_name(int64_t number) {
    const nm_isa *isa = isa_of(number);
    return isa ? isa->name : 0;
}

/* whether jobs may be of halves (dots.h) */
NM_EXPORT int64_t nm_halves(int64_t number) {
#if defined(__x86_64__) && __GNUC__ >= 10
    return number == 2 && isa_of(number) && __builtin_cpu_supports("avx512bf16");
#else
    return (void)number, 0;
#endif
}

/* for benchmarks: limits.h */
NM_EXPORT int64_t nm_multiply_adds(int64_t isa, int64_t rounds) { return isa_of(isa)->multiply_adds(rounds); }
NM_EXPORT void nm_read_all(int64_t isa, const float *from, int64_t count) { isa_of(isa)->read_all(from, count); }

/* bytes of scratch for the whole job */
NM_EXPORT int64_t nm_scratch_bytes(int64_t isa, const nm_job *job) {
    return nm_up(isa_of(isa)->scratch(job), 64) * 64 * nm_max(1, job->threads);
}

/* parallel: GOMP_parallel, or NULL to run in the calling thread alone. Returns NM_OK or what is wrong; y is then unfinished. */
NM_EXPORT int nm_run(int64_t isa, const nm_job *job, parallel_fn parallel) {
    const int64_t each = nm_up(isa_of(isa)->scratch(job), 64) * 64, threads = nm_max(1, job->threads);
    if (each * threads > job->scratch_bytes) return NM_SCRATCH;
    team t = {job, isa_of(isa), isa_of(isa)->tasks(job), each, 0, 0, NM_OK};
    const int64_t wanted = nm_min(threads, t.tasks);
    if (parallel && wanted > 1) parallel(work, &t, (unsigned)wanted, 0);
    else work(&t);
    return t.error;
}
