/* Work on weights that are not packed: masks, and what training does with them. Python hands over one array of 64-bit fields,
 * in this order (runtime/native/sweep.py packs it). */
#ifndef NM_SWEEP_H
#define NM_SWEEP_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define NM_WIDEST 32 /* the largest M */

/* Weights lie as [outer, groups, M, inner]: a group's M weights are `inner` numbers apart. Live sets as [outer, inner, groups, bytes]. */
enum {
    NM_KEEP = 0,      /* out = mask ? weight : 0, by bits */
    NM_GRADIENTS = 1, /* out = covered ? grad : 0, second = weight * out, then * 0 in groups with at most one live bit */
    NM_DECAY = 2,     /* out = (weight - masked) * decay + grad, rounded three times */
    NM_COVER = 3,     /* out: bytes 0 or 1, the positions that a live combination has; table: a byte a position for [bytes, 256] */
    NM_RETIRE = 4,    /* out: live sets with the `keep` best of every group; weight: scores; table: positions [combinations, n] */
    NM_MASK = 5,      /* out: bytes 0 or 1, the n largest magnitudes of every group, the lower index among equals */
    NM_LARGEST = 6,   /* out = that mask ? weight : 0 */
    NM_COVERED = 7,   /* out = covered ? weight : 0, by bits; covered: what NM_COVER writes */
    NM_MAX_SUMS = 8,  /* out[i, j] = sum of max(weight[i], grad[order[j]]) over `inner` bytes, 64-bit [outer, n]; groups and m are 1 */
};

typedef struct {
    int64_t kind, item; /* item: bytes a number */
    const void *weight, *grad, *masked;
    const uint8_t *mask, *live, *table;
    const int64_t *order; /* NULL, or of NM_MASK and NM_LARGEST: row `order[i]` is the i-th row, outer is 1, a row is `inner` long */
    void *out, *second;
    int64_t outer, groups, inner, n, m;
    int64_t bytes, combinations, keep; /* of a live set */
    double decay;
    int64_t threads;
} nm_sweep;

/* Units first..last of a sweep: numbers of NM_KEEP and NM_DECAY, else pairs (outer, group). */
typedef void (*nm_sweep_part)(const nm_sweep *, int64_t first, int64_t last);

void nm_sweep_avx512(const nm_sweep *, int64_t first, int64_t last);
void nm_sweep_avx2(const nm_sweep *, int64_t first, int64_t last);
void nm_sweep_portable(const nm_sweep *, int64_t first, int64_t last);

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Where the live set of one group begins. */
static inline const uint8_t *live_set(const nm_sweep *s, int64_t unit, int64_t t) {
    if (s->inner == 1) return s->live + unit * s->bytes;
    const int64_t o = unit / s->groups, g = unit % s->groups;
    return s->live + ((o * s->inner + t) * s->groups + g) * s->bytes;
}

#endif
