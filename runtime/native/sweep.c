/* Sweeps as Python sees them: parts of one are taken in turn by the threads of torch's own OpenMP pool. */
#include "sweep.h"

#if defined(_WIN32)
#define NM_EXPORT __declspec(dllexport)
#else
#define NM_EXPORT __attribute__((visibility("default")))
#endif

#define PART 65536 /* numbers */

typedef void (*parallel_fn)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

typedef struct {
    const nm_sweep *sweep;
    nm_sweep_part run;
    int64_t units, step, next;
} team;

static void work(void *shared) {
    team *t = shared;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&t->next, t->step, __ATOMIC_RELAXED);
        if (first >= t->units) return;
        t->run(t->sweep, first, least(first + t->step, t->units));
    }
}

NM_EXPORT int64_t nm_sweep_bytes(void) { return sizeof(nm_sweep); }

/* isa: one that nm_isa_name knows; parallel: GOMP_parallel, or NULL to run in the calling thread alone */
NM_EXPORT void nm_run_sweep(int64_t isa, const nm_sweep *s, parallel_fn parallel) {
    nm_sweep_part run = nm_sweep_portable;
#if defined(__x86_64__)
    if (isa == 1) run = nm_sweep_avx2;
    if (isa == 2) run = nm_sweep_avx512;
#else
    (void)isa;
#endif
    const int64_t group = s->m * s->inner, pairs = s->outer * s->groups;
    const int by_number = s->kind == NM_KEEP || s->kind == NM_DECAY;
    const int64_t step = by_number ? PART : (PART + group - 1) / (group ? group : 1);
    team t = {s, run, by_number ? pairs * group : pairs, step ? step : 1, 0};
    const int64_t wanted = least(s->threads, (t.units + t.step - 1) / t.step);
    if (parallel && wanted > 1) parallel(work, &t, (unsigned)wanted, 0);
    else work(&t);
}
