/* Numbers of 32 bits whose groups lie side by side in vectors, M a power of two: the live bytes of a vector's groups are tested at
 * once against the combinations that have each position, so that no mask is written down. */

#define WIDE (BYTES / 4)
#define MOST_WORDS 8 /* of 4 live bytes for a vector: 2:4 has 1; 4:8, with 16 numbers in a vector, 5 */
#define BLOCK 2048   /* numbers */
#define FAR (1 << 19) /* numbers: 2 MB */

typedef int32_t places __attribute__((vector_size(BYTES)));
typedef float reals __attribute__((vector_size(BYTES)));
typedef int32_t places_any __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef float reals_any __attribute__((vector_size(BYTES), aligned(4), may_alias));

/* words: how many; bytes: live ones of a vector's groups; word k begins at byte at[k]; has[k]: in lane i bits of combinations that
 * have its position. */
typedef struct {
    int64_t words, bytes, groups, at[MOST_WORDS];
    places has[MOST_WORDS];
} tests;

/* Returns whether these live sets can be tested so. */
static int make_tests(const nm_sweep *s, tests *t) {
    const int64_t m = s->m, bytes = s->bytes;
    uint8_t members[4 * MOST_WORDS][NM_WIDEST];
    if (s->item != 4 || s->inner != 1 || m > WIDE || m & (m - 1) || bytes * (WIDE / m) > 4 * MOST_WORDS) return 0;
    t->groups = WIDE / m, t->bytes = bytes * t->groups, t->words = (t->bytes + 3) / 4;
    know_members(s, members);
    for (int64_t k = 0; k < t->words; k++) {
        t->at[k] = t->bytes < 4 ? 0 : least(4 * k, t->bytes - 4); /* the last word overlaps the one before */
        t->has[k] = (places){0};
        for (int64_t b = t->at[k]; b < least(t->at[k] + 4, t->bytes); b++)
            for (int64_t j = 0; j < m; j++)
                t->has[k][b / bytes * m + j] |= (int32_t)((uint32_t)members[b % bytes][j] << (8 * (b - t->at[k])));
    }
    return 1;
}

/* -1 where a live combination has the position, else 0. */
static inline __attribute__((always_inline)) places hits(const tests *t, const uint8_t *live, int64_t words, int64_t bytes) {
    uint32_t word = live[0];
    if (bytes >= 4) memcpy(&word, live, 4);
    if (bytes == 2 || bytes == 3) word |= (uint32_t)live[1] << 8;
    if (bytes == 3) word |= (uint32_t)live[2] << 16;
    places hit = ((places){0} + (int32_t)word) & t->has[0];
    for (int64_t k = 1; k < words; k++) {
        memcpy(&word, live + t->at[k], 4);
        hit |= ((places){0} + (int32_t)word) & t->has[k];
    }
    return hit != 0;
}

static inline __attribute__((always_inline)) int64_t covered_of(
    const nm_sweep *s, const tests *t, int64_t first, int64_t last, int64_t words, int64_t bytes, int64_t groups) {
    const uint8_t *live = s->live + first * s->bytes;
    const int32_t *weight = (const int32_t *)s->weight + first * s->m;
    int32_t *out = (int32_t *)s->out + first * s->m;
    for (; first + groups <= last; first += groups, live += bytes, weight += WIDE, out += WIDE)
        *(places_any *)out = *(const places_any *)weight & hits(t, live, words, bytes);
    return first;
}

/* Whether the weight's gradient is written past the caches: a large one, which the optimizer reads when all layers are done. For that
 * of the scores it has not been measured in a whole step. */
static inline int goes_far(const nm_sweep *s, int64_t first) {
    return BYTES >= 32 && s->outer * s->groups * s->m >= FAR && (uintptr_t)((float *)s->out + first * s->m) % BYTES == 0;
}

static inline __attribute__((always_inline)) void write_far(float *to, reals values) {
#if BYTES == 64
    _mm512_stream_ps(to, (__m512)values);
#elif BYTES == 32
    _mm256_stream_ps(to, (__m256)values);
#else
    *(reals_any *)to = values;
#endif
}

static inline __attribute__((always_inline)) int64_t gradients_of(
    const nm_sweep *s, const tests *t, int64_t first, int64_t last, int64_t words, int64_t bytes, int64_t groups, int far) {
    const uint8_t *live = s->live + first * s->bytes;
    const int64_t from = first * s->m;
    const int32_t *grad = (const int32_t *)s->grad + from;
    const float *weight = (const float *)s->weight + from;
    float *out = (float *)s->out + from, *second = (float *)s->second + from;
    for (; first + groups <= last; first += groups, live += bytes, grad += WIDE, weight += WIDE, out += WIDE, second += WIDE) {
        const reals through = (reals)(*(const places_any *)grad & hits(t, live, words, bytes));
        if (far) write_far(out, through);
        else *(reals_any *)out = through;
        *(reals_any *)second = *(const reals_any *)weight * through;
    }
    return first;
}

/* What decided groups sent to their scores. */
static inline __attribute__((always_inline)) void take_back(const nm_sweep *s, int64_t first, int64_t last, int64_t m) {
    float *second = (float *)s->second + first * m;
    for (const uint8_t *live = s->live + first * s->bytes; first < last; first++, live += s->bytes, second += m) {
        const float choice = (float)undecided(live, s->bytes);
        for (int64_t j = 0; j < m; j++) second[j] *= choice;
    }
}

/* Units first.. as far as whole vectors go; returns how far that is. */
static int64_t covered_beside(const nm_sweep *s, int64_t first, int64_t last) {
    tests t;
    if (!make_tests(s, &t)) return first;
    if (t.bytes == WIDE / 4 && s->m == 4) return covered_of(s, &t, first, last, 1, WIDE / 4, WIDE / 4);
    if (t.bytes == 18 && s->m == 8) return covered_of(s, &t, first, last, 5, 18, 2);
    if (t.bytes == 9 && s->m == 8) return covered_of(s, &t, first, last, 3, 9, 1);
    return covered_of(s, &t, first, last, t.words, t.bytes, t.groups);
}

/* As `gradients_of`, compiled for the shapes that are met most. */
static inline __attribute__((always_inline)) int64_t gradients_for(
    const nm_sweep *s, const tests *t, int64_t first, int64_t last, int far) {
    if (t->bytes == WIDE / 4 && s->m == 4) return gradients_of(s, t, first, last, 1, WIDE / 4, WIDE / 4, far);
    if (t->bytes == 18 && s->m == 8) return gradients_of(s, t, first, last, 5, 18, 2, far);
    if (t->bytes == 9 && s->m == 8) return gradients_of(s, t, first, last, 3, 9, 1, far);
    return gradients_of(s, t, first, last, t->words, t->bytes, t->groups, far);
}

static int64_t gradients_beside(const nm_sweep *s, int64_t first, int64_t last) {
    tests t;
    if (!make_tests(s, &t)) return first;
    const int64_t step = BLOCK / s->m;
    const int far = goes_far(s, first);
    for (int64_t stop = first; first < last && first == stop;) {
        stop = least(first + step, last);
        const int64_t from = first;
        first = far ? gradients_for(s, &t, first, stop, 1) : gradients_for(s, &t, first, stop, 0);
        if (all_undecided(s->live + from * s->bytes, first - from, s->bytes)) continue;
        if (s->m == 4) take_back(s, from, first, 4);
        else if (s->m == 8) take_back(s, from, first, 8);
        else take_back(s, from, first, s->m);
    }
#if BYTES >= 32
    if (far) _mm_sfence(); /* whoever is told that this part is done sees it */
#endif
    return first;
}
