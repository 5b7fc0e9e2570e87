/* The lowest live combination of 4:8 by keys: whole numbers in doubles, so that one addition and one minimum look at one.
 *
 * A group's scores, less the lowest of them and times a power of two, are whole numbers q below 2^43. With c = base + t the number of
 * the combination of a head of three and the last position t (neighbours begin alike)
 *
 *     128 * (sum of q) - c = (128 * (sum of q over the head) - base) + (128 * q[t] - t)
 *
 * is exact, its order is that of the sums, the last among equals the lowest, and its end says which. Where scores are no such whole
 * numbers (they span more than 2^19, or so) `lowest_live` looks at the sums as they are. */

#define KEYED 8    /* M, of which 4 are kept */
#define ALL_KEYS 70    /* combinations */
#define STEP 128.0 /* a power of two beyond them */

/* STEP * q of every position to `steps`; returns whether q are the scores exactly, and tame, in all groups. */
static inline __attribute__((always_inline)) int whole_scores(const sums *own, sums *steps) {
    const sums magic = (sums){0} + 0x1.8p52; /* added and taken away: rounds to a whole number */
    sums low = own[0], high = own[0];
    for (int64_t j = 1; j < KEYED; j++) low = lower(own[j], low), high = higher(own[j], high);
    /* a power of two, the largest that keeps q below 2^43; any where all scores are equal */
    const sums room = 0x1p43 / either(high > low, high - low, (sums){0} + 1.0);
    const sums by = (sums)((whole)room & (int64_t)0x7ff0000000000000); /* the mantissa is cut off */
    whole same = (low > -TAME) & (high < TAME);
    for (int64_t j = 0; j < KEYED; j++) {
        const sums apart = own[j] - low, times = apart * by, q = (times + magic) - magic;
        same &= (apart + low == own[j]) & (own[j] - apart == low) & (q == times);
        steps[j] = q * STEP;
    }
    return in_all(same);
}

/* The lower of key and best where the highest bit of word is set, else best. */
static inline __attribute__((always_inline)) sums lower_if(whole word, sums key, sums best) {
#if BYTES == 64
    return (sums)_mm512_mask_min_pd((__m512d)best, _mm512_movepi64_mask((__m512i)word), (__m512d)key, (__m512d)best);
#elif BYTES == 32 && defined(__AVX2__)
    return (sums)_mm256_min_pd(_mm256_blendv_pd((__m256d)best, (__m256d)key, (__m256d)word), (__m256d)best);
#else
    return either((word < 0) & (key < best), key, best);
#endif
}

/* Of the live sets the bits from c down to the first of its machine word, the highest first. */
static inline __attribute__((always_inline)) whole bits_down_from(int64_t c, const uint8_t *const live[SIDE]) {
    whole word;
    for (int k = 0; k < SIDE; k++) word[k] = (int64_t)live_word(live[k], (ALL_KEYS + 7) / 8, c & ~(int64_t)63);
    return word << (63 - (c & 63));
}

/* As `lowest_live`, for what `whole_scores` made. A group without a live combination gets any. */
static inline __attribute__((always_inline)) whole lowest_key(const sums *steps, const uint8_t *const live[SIDE]) {
    sums tails[KEYED], best[2]; /* two chains */
    for (int64_t t = 0; t < KEYED; t++) tails[t] = steps[t] - (double)t;
    best[0] = best[1] = (sums){0} + 0x1p62;
    int64_t c = ALL_KEYS; /* from the last to the first; unrolled, all of it is known to the compiler */
    whole word = bits_down_from(ALL_KEYS - 1, live);
#pragma GCC unroll 8
    for (int64_t i = KEYED - 4; i >= 0; i--)
#pragma GCC unroll 8
        for (int64_t j = KEYED - 3; j > i; j--) {
            const sums two = steps[i] + steps[j];
#pragma GCC unroll 8
            for (int64_t k = KEYED - 2; k > j; k--) {
                const sums head = two + steps[k] - (double)(c - KEYED);
#pragma GCC unroll 8
                for (int64_t t = KEYED - 1; t > k; t--) {
                    if ((--c & 63) == 63) word = bits_down_from(c, live);
                    best[c & 1] = lower_if(word, head + tails[t], best[c & 1]);
                    word <<= 1;
                }
            }
        }
    const sums found = lower(best[0], best[1]);
    whole which;
    for (int k = 0; k < SIDE; k++) which[k] = -(int64_t)found[k] & ((int64_t)STEP - 1);
    return which;
}
