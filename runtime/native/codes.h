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

/* Where kept positions lie, [step][lane], neighbours along k ``width`` apart. Small: 16 bits each, from the start of the block
 * on, as a panel is addressed; else 32 bits, modulo ``around``, as a permutation chooses from a window. */
static inline __attribute__((always_inline)) int places_of(const nm_job *j, const int bits, const int checked, const int small,
        const uint32_t *codes, int64_t step0, int64_t count, uint32_t width, uint32_t around, void *places) {
    const int a_word = 32 / bits;
    const uint32_t mask = (1u << bits) - 1, last = (uint32_t)j->m - 1, group = (uint32_t)j->m * width;
    vu wrong = {0};
    for (int part = 0; part < PARTS; part++) {
        int64_t left = a_word - step0 % a_word, kept = 0;
        uint32_t base = 0;
        const uint32_t *word = codes + step0 / a_word * NM_LANES + part * V;
        char *to = (char *)places + part * V * (small ? 2 : 4);
        vu now = *(const vuu *)word >> (uint32_t)((a_word - left) * bits);
        for (int64_t step = 0; step < count; step++, to += NM_LANES * (small ? 2 : 4)) {
            if (!left) word += NM_LANES, now = *(const vuu *)word, left = a_word;
            vu code = now & mask;
            if (checked) code = clamped(code, last, &wrong);
            if (small) *(vhu *)to = __builtin_convertvector(code * width + base, vhu);
            else *(vuu *)to = code * width + base;
            now >>= bits;
            left--;
            if (++kept == j->n) kept = 0, base = small ? base + group : (base + group) % around;
        }
    }
    return checked && any(wrong);
}

#define PLACES(BITS, CHECKED, SMALL) places_of(j, BITS, CHECKED, SMALL, codes, step0, count, width, around, places)
static inline __attribute__((always_inline)) int all_places(const nm_job *j, const int small, const uint32_t *codes, int64_t step0,
        int64_t count, uint32_t width, uint32_t around, void *places) {
    if (j->m == 4) return PLACES(2, 0, small);
    if (j->m == 16) return PLACES(4, 0, small);
    return PLACES(nm_bits(j->m), 1, small);
}
#undef PLACES

/* bytes from the start of a panel whose rows are ``width`` bytes apart */
static int panel_places(const nm_job *j, const uint32_t *codes, int64_t step0, int64_t count, int64_t width, uint16_t *places) {
    return all_places(j, 1, codes, step0, count, (uint32_t)width, 0, places);
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
