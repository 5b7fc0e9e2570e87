/* A product over (max, +) of bytes: what a search for an order weighs. Rows are whole vectors; zeros that fill one up add nothing.
 * For AVX2 and AVX-512, which have both steps as one instruction; elsewhere numba's loop is the faster one. */

#define SUM_ROWS 2048 /* of a block: a tile's four rows of both sides stay in the first cache */
#define SUM_TILE 4

typedef uint8_t octets_any __attribute__((vector_size(BYTES), aligned(1), may_alias));
typedef uint8_t octets ALL_LANES;

/* Of every eight neighbours the sum of the larger ones. */
static inline __attribute__((always_inline)) bare_64 larger_sums(octets a, octets b) {
#if BYTES == 64
    return (bare_64)_mm512_sad_epu8(_mm512_max_epu8((__m512i)a, (__m512i)b), _mm512_setzero_si512());
#else
    return (bare_64)_mm256_sad_epu8(_mm256_max_epu8((__m256i)a, (__m256i)b), _mm256_setzero_si256());
#endif
}

static inline __attribute__((always_inline)) void sum_tile(const uint8_t *const *slots, const uint8_t *const *columns, int64_t from,
                                                           int64_t to, int64_t (*sums)[SUM_TILE]) {
    bare_64 kept[SUM_TILE][SUM_TILE];
    memset(kept, 0, sizeof kept);
    for (int64_t r = from; r < to; r += BYTES) {
        octets slot[SUM_TILE];
#pragma GCC unroll 4
        for (int i = 0; i < SUM_TILE; i++) slot[i] = *(const octets_any *)(slots[i] + r);
#pragma GCC unroll 4
        for (int j = 0; j < SUM_TILE; j++) {
            const octets column = *(const octets_any *)(columns[j] + r);
#pragma GCC unroll 4
            for (int i = 0; i < SUM_TILE; i++) kept[i][j] += larger_sums(slot[i], column);
        }
    }
    for (int i = 0; i < SUM_TILE; i++)
        for (int j = 0; j < SUM_TILE; j++) {
            sums[i][j] = 0;
            for (int lane = 0; lane < BYTES / 8; lane++) sums[i][j] += (int64_t)kept[i][j][lane];
        }
}

/* Slots first..last. A tile that reaches beyond its matrix computes the last row again and leaves that out. */
static void max_sums(const nm_sweep *s, int64_t first, int64_t last) {
    int64_t *out = s->out;
    memset(out + first * s->n, 0, (size_t)((last - first) * s->n) * sizeof *out);
    for (int64_t from = 0; from < s->inner; from += SUM_ROWS)
        for (int64_t i = first; i < last; i += SUM_TILE)
            for (int64_t j = 0; j < s->n; j += SUM_TILE) {
                const uint8_t *slots[SUM_TILE], *columns[SUM_TILE];
                int64_t sums[SUM_TILE][SUM_TILE];
                for (int k = 0; k < SUM_TILE; k++) {
                    slots[k] = (const uint8_t *)s->weight + least(i + k, last - 1) * s->inner;
                    columns[k] = (const uint8_t *)s->grad + s->order[least(j + k, s->n - 1)] * s->inner;
                }
                sum_tile(slots, columns, from, least(from + SUM_ROWS, s->inner), sums);
                for (int64_t a = i; a < least(i + SUM_TILE, last); a++)
                    for (int64_t b = j; b < least(j + SUM_TILE, s->n); b++) out[a * s->n + b] += sums[a - i][b - j];
            }
}
