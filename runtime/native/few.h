/* The product for few tokens, where every weight is read once: 16 outputs lie in lanes and x stays as it is.
 *
 *     for tile of 16 rows:  for group of m:  for each kept position:
 *       sums[token][lanes] += value[step][lanes] * x[token][group + code[step][lanes]]      # x chosen by a permutation
 *
 * A choice loads 4, 8, 16 or 32 floats from the group's start on; the last groups of a token read from a padded copy. */

#define TAIL 96 /* floats of a token's padded copy: a window of 32 before the last group, that group, a window after it */

/* one of 4, 8, 16 or 32 floats, in 2, 3, 4 or 8 bits of a code whose others are nobody's */
static inline __attribute__((always_inline)) vf chosen(const float *x, vu code, const int bits) {
#if V == 16
    if (bits == 2) return (vf)_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(x)), (__m512i)code);
    if (bits == 3) {
        const __m512 twice = (__m512)_mm512_broadcast_f64x4((__m256d)_mm256_loadu_ps(x));
        return (vf)_mm512_permutexvar_ps((__m512i)code, twice);
    }
    if (bits == 4) return (vf)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(x));
    return (vf)_mm512_permutex2var_ps(_mm512_loadu_ps(x), (__m512i)code, _mm512_loadu_ps(x + 16));
#elif V == 8
    if (bits == 2) return (vf)_mm256_permutevar_ps(_mm256_broadcast_ps((const __m128 *)x), (__m256i)code);
    if (bits == 3) return (vf)_mm256_permutevar8x32_ps(_mm256_loadu_ps(x), (__m256i)code);
    if (bits == 4) {
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), (__m256i)code);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 8), (__m256i)code);
        return (vf)_mm256_blendv_ps(low, high, (__m256)(code << 28));
    }
    return (vf)_mm256_i32gather_ps(x, (__m256i)(code & 31), 4);
#else
    vf result;
    for (int i = 0; i < V; i++) result[i] = x[code[i] & ((1u << bits) - 1)];
    return result;
#endif
}

/* Ask for a line of values before they are needed: the processor's own prefetching stops at the end of a page. How far ahead,
 * and into which cache, is what was fastest: T1 where values take no longer to use than to read, else T0 from afar. */
static inline __attribute__((always_inline)) void ask_for_values(const int64_t dtype, const int T, const int R, const char *values) {
    if (dtype == NM_F32 && T == 1) __builtin_prefetch(values + 512 * R, 0, 2);
    else __builtin_prefetch(values + 4096);
}

/* Values of one step, the PART-th vector of them. A permutation of 16 bits sets bfloat16 where a float has its high half, in one
 * operation where extending and shifting are two; it reads two steps at once, so a step may not be the last one without its pair. */
static inline __attribute__((always_inline)) vf paired_value(const int64_t dtype, const char *values, int64_t step, int part) {
#if V == 16
    if (dtype == NM_BF16) {
        const vu high = {0x0, 0x10000, 0x20000, 0x30000, 0x40000, 0x50000, 0x60000, 0x70000,
                         0x80000, 0x90000, 0xa0000, 0xb0000, 0xc0000, 0xd0000, 0xe0000, 0xf0000};
        const __m512i places = (__m512i)(high + ((uint32_t)(step % 2) << 20));
        return (vf)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, places, _mm512_loadu_si512(values + step / 2 * 64));
    }
#endif
    return value_at(dtype, values, step * NM_LANES + part * V);
}

/* one step: T tokens times the 16 lanes of one kept position. bits: of `chosen`; shift: of a code, to come to the next one */
static inline __attribute__((always_inline)) void step_of(const int64_t dtype, const int bits, const int shift, const int T,
        const int in_pairs, const char *values, int64_t step, vu code[PARTS], const float *x, int64_t ldx, vf sums[][PARTS]) {
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; part++) {
        const vf value = in_pairs ? paired_value(dtype, values, step, part) : value_at(dtype, values, step * NM_LANES + part * V);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sums[t][part] += value * chosen(x + t * ldx, code[part], bits);
        code[part] >>= shift;
    }
}

/* What the instances below are made of: values' dtype D, bits B of a code, T tokens at once, N kept of a group (0: j->n).
 * x: the first token's group g0. Sums go through memory between the parts of a tile, which is nothing beside its steps. */
#define PARAMETERS const nm_job *j, const char *values, const uint32_t *codes, int64_t g0, int64_t g1, const float *x, int64_t ldx, \
                   vf sums[][PARTS], vu *wrong

/* groups one by one */
static inline __attribute__((always_inline)) void span_of(const int64_t D, const int B, const int T, PARAMETERS) {
    const int a_word = 32 / B;
    const uint32_t last = (uint32_t)j->m - 1;
    vf kept[8][PARTS];
    memcpy(kept, sums, sizeof(vf[PARTS]) * (size_t)T);
    for (int64_t g = g0; g < g1; g++, x += j->m)
        for (int64_t step = g * j->n; step < (g + 1) * j->n; step++) {
            vu code[PARTS];
            for (int part = 0; part < PARTS; part++) {
                const vu word = *(const vuu *)(codes + step / a_word * NM_LANES + part * V) >> (uint32_t)(step % a_word * B);
                code[part] = clamped(word & ((1u << B) - 1), last, wrong);
            }
            step_of(D, B, 0, T, 0, values, step, code, x, ldx, kept);
        }
    memcpy(sums, kept, sizeof(vf[PARTS]) * (size_t)T);
}

/* Whole words of codes: their steps are unrolled. Of n:8 three of a code's four bits say the place, so that none leads beyond its
 * group, and one look at a word says whether the fourth is set. One sum a token would wait for its last addition at
 * every step, so few tokens have several, in turn, which are added up at the end. R is 1 or 2 tiles at once, the second one that much
 * further in values and in codes, its sums 8 behind the first one's. Writes sums; returns the group that comes next. */
static inline __attribute__((always_inline)) int64_t words_of(const int64_t D, const int M, const int T, const int N, const int R,
        PARAMETERS, int64_t more_values, int64_t more_codes) {
    const int B = M == 4 ? 2 : 4, places = M == 8 ? 3 : B, a_word = 32 / B, groups = a_word / N, turns = T < 4 ? 4 / T : 1;
    const int value_bytes = D == NM_F32 ? 4 : D == NM_BF16 ? 2 : 1;
    (void)j;
    vf kept[2][8][PARTS] = {0};
    int64_t g = g0;
    for (; g + groups <= g1; g += groups, x += groups * M) {
        const int64_t step = g * N;
        const char *from = values + step * NM_LANES * value_bytes;
        vu code[2][PARTS];
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
            for (int part = 0; part < PARTS; part++)
                code[r][part] = *(const vuu *)(codes + r * more_codes + step / a_word * NM_LANES + part * V);
            if (M == 8)
                for (int part = 0; part < PARTS; part++) *wrong |= code[r][part] & 0x88888888u;
            for (int line = 0; line < a_word * NM_LANES * value_bytes / LINE; line++)
                ask_for_values(D, T, R, from + r * more_values + line * LINE);
        }
#pragma GCC unroll 16
        for (int s = 0; s < a_word; s++)
#pragma GCC unroll 2
            for (int r = 0; r < R; r++)
                step_of(D, places, B, T, 1, from + r * more_values, s, code[r], x + s / N * M, ldx, kept[r] + s % turns * T);
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int t = T; t < turns * T; t++)
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; part++) kept[r][t % T][part] += kept[r][t][part];
        memcpy(sums + r * 8, kept[r], sizeof(vf[PARTS]) * (size_t)T);
    }
    return g;
}

typedef void (*span_fn)(PARAMETERS);
typedef int64_t (*words_fn)(PARAMETERS, int64_t more_values, int64_t more_codes);
#define SPAN(D, B, T) static void span_##D##_##B##_##T(PARAMETERS) { span_of(D, B, T, j, values, codes, g0, g1, x, ldx, sums, wrong); }
#define WORDS(D, M, T, N, R) \
    static int64_t words_##D##_##M##_##T##_##N##_##R(PARAMETERS, int64_t more_values, int64_t more_codes) { \
        return words_of(D, M, T, N, R, j, values, codes, g0, g1, x, ldx, sums, wrong, more_values, more_codes); \
    }

#define ALL_T(OF, D, B) OF(D, B, 1) OF(D, B, 2) OF(D, B, 4) OF(D, B, 8)
#define ALL_B(OF, D) ALL_T(OF, D, 2) ALL_T(OF, D, 4) ALL_T(OF, D, 8)
ALL_B(SPAN, 0)
ALL_B(SPAN, 1)
ALL_B(SPAN, 2)
#define SPANS_T(D, B) {span_##D##_##B##_1, span_##D##_##B##_2, span_##D##_##B##_4, span_##D##_##B##_8}
#define SPANS(D) {SPANS_T(D, 2), SPANS_T(D, 4), SPANS_T(D, 8)}
static const span_fn span_for[3][3][4] = {SPANS(0), SPANS(1), SPANS(2)}; /* [dtype][bits][tokens] */

/* The patterns that most weights have, n:4, n:8 and n:16 with n of 1 and 2, where vectors are wide. Two tiles at once are two places
 * that are read, to which memory answers faster than to one: worth it for a token of float32, with AVX-512's 32 registers. */
#if V == 4
static words_fn words_for(const nm_job *j, int size, int tiles) { (void)j, (void)size, (void)tiles; return 0; }
#else
#define WORDS_T(D, M, N) WORDS(D, M, 1, N, 1) WORDS(D, M, 2, N, 1) WORDS(D, M, 4, N, 1) WORDS(D, M, 8, N, 1)
#define WORDS_N(D) WORDS_T(D, 4, 1) WORDS_T(D, 4, 2) WORDS_T(D, 8, 1) WORDS_T(D, 8, 2) WORDS_T(D, 16, 1) WORDS_T(D, 16, 2)
WORDS_N(0)
WORDS_N(1)
WORDS_N(2)
#define NAMES_T(D, M, N) \
    {words_##D##_##M##_1_##N##_1, words_##D##_##M##_2_##N##_1, words_##D##_##M##_4_##N##_1, words_##D##_##M##_8_##N##_1}
#define NAMES_N(D, M) {NAMES_T(D, M, 1), NAMES_T(D, M, 2)}
#define NAMES(D) {NAMES_N(D, 4), NAMES_N(D, 8), NAMES_N(D, 16)}
static const words_fn known_words[3][3][2][4] = {NAMES(0), NAMES(1), NAMES(2)}; /* [dtype][m][n][tokens] */
#if V == 16
#define TWO_TILES(M) WORDS(0, M, 1, 1, 2) WORDS(0, M, 1, 2, 2)
TWO_TILES(4) TWO_TILES(8) TWO_TILES(16)
static const words_fn two_tiles[3][2] = { /* [m][n] */
    {words_0_4_1_1_2, words_0_4_1_2_2}, {words_0_8_1_1_2, words_0_8_1_2_2}, {words_0_16_1_1_2, words_0_16_1_2_2},
};
#else
static const words_fn two_tiles[3][2];
#endif

static words_fn words_for(const nm_job *j, int size, int tiles) {
    if ((j->m != 4 && j->m != 8 && j->m != 16) || j->n > 2) return 0;
    const int m = j->m == 4 ? 0 : j->m == 8 ? 1 : 2;
    if (tiles == 2) return j->dtype == NM_F32 && size == 0 ? two_tiles[m][j->n - 1] : 0;
    return known_words[j->dtype][m][j->n - 1][size];
}
#endif

static __attribute__((noinline)) void finish(const nm_job *j, int64_t tile, int64_t token, int64_t count, vf sums[][PARTS]) {
    const int64_t group = tile / nm_tiles(j), row = tile % nm_tiles(j) * NM_LANES, rows = nm_min(NM_LANES, j->rows - row);
    float start[NM_LANES] = {0};
    if (j->bias) memcpy(start, j->bias + group * j->rows + row, (size_t)rows * 4);
    for (int64_t t = 0; t < count; t++)
        for (int64_t lane = 0; lane < rows; lane += V) {
            const int64_t place = (token + t) * j->ldy + group * j->rows + row + lane, some = nm_min(V, rows - lane);
            vf y = sums[t][lane / V];
            if (j->scales) y *= load(j->scales + tile * NM_LANES + lane);
            y += load(start + lane);
            if (j->residual) y += some == V ? load(j->residual + place) : load_some(j->residual + place, some);
            y = activate(y, j->activation);
            if (some == V) store(j->y + place, y);
            else store_some(j->y + place, y, some);
        }
}

static int64_t few_tiles(const nm_job *j) { return nm_tiles(j) * j->groups; }

/* several tiles a task, so that the queue of tasks costs nothing; enough tasks that workers end together */
static int64_t few_tiles_a_task(const nm_job *j) { return nm_up(few_tiles(j), 8 * nm_max(1, j->threads)); }

static int64_t few_tasks(const nm_job *j) { return nm_up(few_tiles(j), few_tiles_a_task(j)); }

static int64_t few_scratch(const nm_job *j) { return (void)j, 64; }

static int run_few(const nm_job *j, int64_t task, char *scratch) {
    (void)scratch;
    const int bits = nm_bits(j->m);
    const int64_t first = task * few_tiles_a_task(j), end = nm_min(few_tiles(j), first + few_tiles_a_task(j)), tokens = nm_tokens(j);
    const int64_t window = bits == 2 ? 4 : bits == 4 ? 16 : 32, groups = j->inputs / j->m;
    const int64_t safe = j->inputs < window ? 0 : nm_min(groups, (j->inputs - window) / j->m + 1), rest = j->inputs - safe * j->m;
    const int64_t a_tile = nm_steps(j) * NM_LANES * nm_value_bytes(j), words = nm_words(j) * NM_LANES;
    /* two tiles at once are half of the task from each other, so that both halves are read in order; an odd one is left */
    const int64_t apart = tokens == 1 && j->groups == 1 && words_for(j, 0, 2) ? (end - first) / 2 : 0;
    vu wrong = {0};
    for (int64_t at = first; at < end - apart; at++) {
        const int tiles = at < first + apart ? 2 : 1;
        const int64_t tile = tiles == 2 ? at : at + apart;
        const float *x = j->x + tile / nm_tiles(j) * j->inputs;
        const char *values = (const char *)j->values + tile * a_tile;
        const uint32_t *codes = j->codes + tile * words;
        for (int64_t token = 0, count; token < tokens; token += count) {
            const int64_t left = tokens - token;
            const int size = left >= MOST_TOKENS ? MOST_TOKENS_LOG : left >= 4 ? 2 : left >= 2 ? 1 : 0;
            count = (int64_t)1 << size;
            const span_fn span = span_for[j->dtype][bits == 2 ? 0 : bits == 4 ? 1 : 2][size];
            const words_fn whole = words_for(j, size, tiles);
            const float *from = x + token * j->ldx;
            vf sums[2][8][PARTS];
            float tail[8 * TAIL];
            int64_t g = 0;
            if (whole) g = whole(j, values, codes, 0, safe, from, j->ldx, sums[0], &wrong, apart * a_tile, apart * words);
            else memset(sums, 0, sizeof sums);
            if (safe < groups)
                for (int64_t t = 0; t < count; t++) {
                    memcpy(tail + t * TAIL, from + t * j->ldx + safe * j->m, (size_t)rest * 4);
                    memset(tail + t * TAIL + rest, 0, (size_t)(TAIL - rest) * 4);
                }
            for (int r = 0; r < tiles; r++) {
                const char *its_values = values + r * apart * a_tile;
                const uint32_t *its_codes = codes + r * apart * words;
                if (g < safe) span(j, its_values, its_codes, g, safe, from + g * j->m, j->ldx, sums[r], &wrong);
                if (safe < groups) span(j, its_values, its_codes, safe, groups, tail, TAIL, sums[r], &wrong);
                finish(j, tile + r * apart, token, count, sums[r]);
            }
        }
    }
    return any(wrong) ? NM_BAD_CODE : NM_OK;
}
#undef NAMES
#undef PARAMETERS
