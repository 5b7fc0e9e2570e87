/* From stored codes to places in the panel and from stored values to floats: for a tile of 16 rows and a block along k. */

#define PARTS (NM_LANES / V)

typedef uint32_t vu __attribute__((vector_size(4 * V)));
typedef uint32_t vuu __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef uint16_t vhu __attribute__((vector_size(2 * V), aligned(1), may_alias));
typedef int8_t vbu __attribute__((vector_size(V), aligned(1), may_alias));

/* V values of one kept position as floats, as they are stored: int8 is not scaled */
static inline __attribute__((always_inline)) vf value_at(int64_t dtype, const char *values, int64_t lane) {
    if (dtype == NM_F32) return *(const vfu *)(values + 4 * lane);
    if (dtype == NM_BF16) return (vf)(__builtin_convertvector(*(const vhu *)(values + 2 * lane), vu) << 16);
#if V == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(values + lane))));
#elif V == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(values + lane))));
#else
    return __builtin_convertvector(*(const vbu *)(values + lane), vf);
#endif
}

/* Codes beyond their group are clamped, so that nothing else is ever read, and ``wrong`` is set. */
static inline __attribute__((always_inline)) vu clamped(vu code, uint32_t last, vu *wrong) {
    const vu beyond = (vu)(code > last);
    *wrong |= beyond;
    return (code & ~beyond) | (last & beyond);
}

static inline int any(vu wrong) {
    uint32_t all = 0;
    for (int i = 0; i < V; i++) all |= wrong[i];
    return all != 0;
}

/* 16 numbers of 16 bits: a tile's places in a panel. Words of codes are taken apart into halves, so that one vector does. */
typedef uint16_t tile_16 __attribute__((vector_size(2 * NM_LANES)));
typedef uint16_t tile_16_any __attribute__((vector_size(2 * NM_LANES), aligned(2), may_alias));

#define HALVES(word) *(const tile_16_any *)(word), *(const tile_16_any *)((word) + NM_LANES / 2)
#define LOW_HALVES(word) __builtin_shufflevector(HALVES(word), 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define HIGH_HALVES(word) __builtin_shufflevector(HALVES(word), 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)

/* Bytes from the start of a panel whose rows are ``width`` bytes apart, [step][lane]. */
static inline __attribute__((always_inline)) int panel_places_of(const nm_job *j, const int bits, const int checked,
        const uint32_t *codes, int64_t step0, int64_t count, uint16_t width, uint16_t *places) {
    const int a_half = 16 / bits;
    const uint16_t mask = (uint16_t)((1u << bits) - 1), last = (uint16_t)(j->m - 1), group = (uint16_t)(j->m * width);
    int64_t half = step0 / a_half, skipped = step0 % a_half, kept = 0;
    uint16_t base = 0;
    tile_16 wrong = {0};
    for (int64_t step = 0; step < count; half++, skipped = 0) {
        const uint32_t *word = codes + half / 2 * NM_LANES;
        tile_16 now = (half % 2 ? HIGH_HALVES(word) : LOW_HALVES(word)) >> (uint16_t)(skipped * bits);
        const int64_t end = nm_min(count, step + a_half - skipped);
        for (; step < end; step++, now >>= (uint16_t)bits) {
            tile_16 code = now & mask;
            if (checked) {
                const tile_16 beyond = (tile_16)(code > last);
                wrong |= beyond;
                code = (code & ~beyond) | (last & beyond);
            }
            *(tile_16_any *)(places + step * NM_LANES) = code * width + base;
            if (++kept == j->n) kept = 0, base = (uint16_t)(base + group);
        }
    }
    uint16_t all = 0;
    for (int i = 0; i < NM_LANES; i++) all |= wrong[i];
    return all != 0;
}

/* Codes of 2 and 4 bits are all possible at M of 4 and 16. */
static int panel_places(const nm_job *j, const uint32_t *codes, int64_t step0, int64_t count, int64_t width, uint16_t *places) {
    if (j->m == 4) return panel_places_of(j, 2, 0, codes, step0, count, (uint16_t)width, places);
    if (j->m == 16) return panel_places_of(j, 4, 0, codes, step0, count, (uint16_t)width, places);
    return panel_places_of(j, nm_bits(j->m), 1, codes, step0, count, (uint16_t)width, places);
}

/* floats [count][16] of a block; those that are float already are used where they are */
static const float *expand_values(const nm_job *j, const char *values, const float *scales, int64_t step0, int64_t count, float *to) {
    if (j->dtype == NM_F32) return (const float *)values + step0 * NM_LANES;
    for (int64_t lane = 0; lane < count * NM_LANES; lane += V) {
        const vf value = value_at(j->dtype, values, step0 * NM_LANES + lane);
        *(vf *)(to + lane) = scales ? value * *(const vfu *)(scales + lane % NM_LANES) : value;
    }
    return to;
}
