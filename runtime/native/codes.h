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

/* places[step][lane]: bytes from the start of the panel, whose rows are ``width`` bytes apart */
static inline __attribute__((always_inline)) int places_of(const nm_job *j, const int bits, const int checked, const uint32_t *codes,
                                                           int64_t step0, int64_t count, int64_t width, uint16_t *places) {
    const int a_word = 32 / bits;
    const uint32_t mask = (1u << bits) - 1, last = (uint32_t)j->m - 1, group = (uint32_t)(j->m * width);
    vu wrong = {0};
    for (int part = 0; part < PARTS; part++) {
        int64_t left = a_word - step0 % a_word, kept = 0;
        uint32_t base = 0;
        const uint32_t *word = codes + step0 / a_word * NM_LANES + part * V;
        uint16_t *to = places + part * V;
        vu now = *(const vuu *)word >> (uint32_t)((a_word - left) * bits);
        for (int64_t step = 0; step < count; step++, to += NM_LANES) {
            if (!left) word += NM_LANES, now = *(const vuu *)word, left = a_word;
            vu code = now & mask;
            if (checked) code = clamped(code, last, &wrong);
            *(vhu *)to = __builtin_convertvector(code * (uint32_t)width + base, vhu);
            now >>= bits;
            left--;
            if (++kept == j->n) kept = 0, base += group;
        }
    }
    return checked && any(wrong);
}

static int expand_codes(const nm_job *j, const uint32_t *codes, int64_t step0, int64_t count, int64_t width, uint16_t *places) {
    if (j->m == 4) return places_of(j, 2, 0, codes, step0, count, width, places);
    if (j->m == 16) return places_of(j, 4, 0, codes, step0, count, width, places);
    return places_of(j, nm_bits(j->m), 1, codes, step0, count, width, places);
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
