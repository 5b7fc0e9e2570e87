/* Of values of many combinations, for SIDE groups side by side: where the lowest and the highest stand. */

#define SIDE (BYTES / 8)
#define MOST_COMBINATIONS 1824
#define TAME 1e37 /* scores up to here, either sign: no sum of NM_WIDEST is beyond a float */
#define FEW 16 /* combinations: their values are written down in less time than it takes to look who is live */

typedef double sums __attribute__((vector_size(BYTES)));
typedef int64_t whole __attribute__((vector_size(BYTES)));

static inline __attribute__((always_inline)) sums either(whole where, sums a, sums b) {
    return (sums)((where & (whole)a) | (~where & (whole)b));
}
static inline __attribute__((always_inline)) sums lower(sums a, sums b) { return either(a < b, a, b); }
static inline __attribute__((always_inline)) sums higher(sums a, sums b) { return either(a > b, a, b); }

/* Whether all lanes of a comparison hold. */
static inline __attribute__((always_inline)) int in_all(whole lanes) {
#if BYTES == 64
    return _mm512_movepi64_mask((__m512i)lanes) == 0xff;
#elif BYTES == 32 && defined(__AVX2__)
    return _mm256_movemask_pd((__m256d)lanes) == 0xf;
#else
    int all = 1;
    for (int k = 0; k < SIDE; k++) all &= lanes[k] != 0;
    return all;
#endif
}

/* The last among equals. */
static whole lowest(const sums *values, int64_t count) {
    sums best[4] = {values[0], values[0], values[0], values[0]}; /* four chains: a comparison takes a while */
    int64_t c = 1;
    for (; c + 4 <= count; c += 4)
        for (int i = 0; i < 4; i++) best[i] = lower(values[c + i], best[i]);
    for (; c < count; c++) best[0] = lower(values[c], best[0]);
    const sums found = lower(lower(best[0], best[1]), lower(best[2], best[3]));
    whole which = {0};
    for (c = 0; c < count; c++) {
        const whole here = values[c] == found;
        which = (here & c) | (~here & which);
    }
    return which;
}

/* The first among equals. */
static whole highest(const sums *values, int64_t count) {
    sums best[4] = {values[0], values[0], values[0], values[0]};
    int64_t c = 1;
    for (; c + 4 <= count; c += 4)
        for (int i = 0; i < 4; i++) best[i] = higher(values[c + i], best[i]);
    for (; c < count; c++) best[0] = higher(values[c], best[0]);
    const sums found = higher(higher(best[0], best[1]), higher(best[2], best[3]));
    whole which = {0};
    for (c = count; c-- > 0;) {
        const whole here = values[c] == found;
        which = (here & c) | (~here & which);
    }
    return which;
}

/* -- the lowest live one, without values written down ---------------------------------------------------------------------------- */

/* Bits c.. of live sets. */
static inline uint64_t live_word(const uint8_t *live, int64_t bytes, int64_t c) {
    uint64_t word = 0;
    if (bytes - c / 8 >= 8) memcpy(&word, live + c / 8, 8);
    else
        for (int64_t b = c / 8; b < bytes; b++) word |= (uint64_t)live[b] << (8 * (b - c / 8));
    return word;
}

static inline int64_t live_count(const uint8_t *live, int64_t bytes) {
    int64_t count = 0;
    for (int64_t c = 0; c < 8 * bytes; c += 64) count += __builtin_popcountll(live_word(live, bytes, c));
    return count;
}

/* Of every combination: its last position, and which of `heads` sums of the others it begins with; neighbours begin alike. */
typedef struct {
    int64_t heads;
    uint16_t head[MOST_COMBINATIONS], of[MOST_COMBINATIONS]; /* of: a combination that begins so */
    uint8_t tail[MOST_COMBINATIONS];
} beginnings;

static void begin_all(const nm_sweep *s, beginnings *b) {
    const int64_t n = s->n;
    b->heads = 0;
    for (int64_t c = 0; c < s->combinations; c++) {
        const uint8_t *member = s->table + c * n;
        if (c == 0 || memcmp(member, member - n, (size_t)(n - 1))) b->of[b->heads++] = (uint16_t)c;
        b->head[c] = (uint16_t)(b->heads - 1), b->tail[c] = member[n - 1];
    }
}

/* Where bit `bit` of word is set and value is not above best, it is the best, and c is where it stands. */
static inline __attribute__((always_inline)) void take_lower(sums value, whole word, int64_t bit, int64_t c, sums *best, whole *which) {
#if BYTES == 64
    const __mmask8 live = _mm512_test_epi64_mask((__m512i)word, _mm512_set1_epi64((int64_t)(1ull << bit)));
    const __mmask8 better = _mm512_mask_cmp_pd_mask(live, (__m512d)value, (__m512d)*best, _CMP_LE_OQ);
    *best = (sums)_mm512_mask_mov_pd((__m512d)*best, better, (__m512d)value);
    *which = (whole)_mm512_mask_set1_epi64((__m512i)*which, better, c);
#else
    const whole better = (value <= *best) & ((word & (int64_t)(1ull << bit)) != 0);
    *best = either(better, value, *best);
    *which = (better & c) | (~better & *which);
#endif
}

/* The last among equals. own: tame; the sums are in the order of the positions. values: room for `heads`. */
static inline __attribute__((always_inline)) whole lowest_live(
    const sums *own, const uint8_t *const live[SIDE], const nm_sweep *s, const beginnings *b, sums *values, int64_t n) {
    const sums none = (sums){0} + (double)__builtin_inff();
    sums best[2] = {none, none};
    whole which[2] = {{0}, {0}};
    if (n == 4) /* the same sums, without looking up what they are of */
        for (int64_t i = 0, h = 0; i < s->m - 3; i++)
            for (int64_t j = i + 1; j < s->m - 2; j++) {
                const sums two = own[i] + own[j];
                for (int64_t k = j + 1; k < s->m - 1; k++) values[h++] = two + own[k];
            }
    for (int64_t h = 0; h < b->heads && n != 4; h++) {
        const uint8_t *member = s->table + b->of[h] * n;
        sums value = own[member[0]];
        for (int64_t i = 1; i < n - 1; i++) value += own[member[i]];
        values[h] = value;
    }
    for (int64_t c = 0; c < s->combinations;) {
        whole word;
        for (int k = 0; k < SIDE; k++) word[k] = (int64_t)live_word(live[k], s->bytes, c);
        const int64_t stop = least(c + 64, s->combinations);
        for (int64_t bit = 0; c < stop; c += 2, bit += 2) /* two chains: a comparison takes a while */
            for (int i = 0; i < 2 && c + i < stop; i++) {
                const sums last = own[b->tail[c + i]], value = n == 1 ? last : values[b->head[c + i]] + last;
                take_lower(value, word, bit + i, c + i, best + i, which + i);
            }
    }
    const whole other = (best[1] < best[0]) | ((best[1] == best[0]) & (which[1] > which[0]));
    return (other & which[1]) | (~other & which[0]);
}

/* Take one combination out of each set that has more than `keep`. */
static inline __attribute__((always_inline)) void drop(
    uint8_t *const kept[SIDE], whole which, whole left, int64_t keep, int64_t side) {
    for (int64_t k = 0; k < side; k++)
        if (left[k] > keep) kept[k][which[k] >> 3] &= (uint8_t)~(1 << (which[k] & 7));
}
