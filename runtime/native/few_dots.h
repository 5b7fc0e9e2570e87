/* The product of few tokens of bfloat16 with bfloat16 values by dots.h's operation: as few.h, every weight is read once, in order,
 * and its codes are taken apart in registers. For n:4, n:8 and n:16 with n of 1 and 2, of which words of codes have whole windows. */

#ifdef NM_DOTS
#pragma GCC push_options
#pragma GCC target("avx512bf16")
#define FEW_DOTS 8 /* tokens at once */
#define MOST_FEW_DOTS 32 /* with more, places are worth writing down */

static int fits_few_dots(const nm_job *j) {
    return j->halves && nm_tokens(j) <= MOST_FEW_DOTS && (j->m == 4 || j->m == 8 || j->m == 16) && j->n <= 2 && one_pixel(j);
}

/* What a tile has: values, words of codes, x at the first token; sums, [T]. The second of two tiles is that much further on in values
 * and codes, and its sums are FEW_DOTS behind the first one's. */
#define PARAMETERS \
    const nm_job *j, const char *values, const uint32_t *codes, const uint16_t *x, vf *sums, int64_t more_values, int64_t more_codes, vu *wrong

/* As `ask_for_values` of few.h. */
static inline __attribute__((always_inline)) void ask_for_pairs(const int T, const char *values) {
    if (T == 1) __builtin_prefetch(values + 1024, 0, 2);
    else __builtin_prefetch(values + 4096);
}

/* One pair of steps of T tokens; base: where its groups begin in the window. Codes of 4 bits may be beyond a group of 8. */
static inline __attribute__((always_inline)) void pair_of(const int T, const int M, const __m512i in[], vu *now, uint32_t base,
        const char *values, __m512 sums[], vu *wrong) {
    const int BITS = M == 4 ? 2 : 4;
    const __m512i value = _mm512_permutexvar_epi16(BESIDE, _mm512_loadu_si512(values));
    vu code = pair_codes(BITS, *now);
    if (M == 8) code = within(code, 7, wrong);
    const __m512i place = (__m512i)(code + base);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) sums[t] = _mm512_dpbf16_ps(sums[t], (__m512bh)value, (__m512bh)_mm512_permutexvar_epi16(place, in[t]));
    *now >>= 2 * BITS;
}

/* Where the groups of a pair of steps begin in their window, in 16 bits each. */
#define BASES(PAIR) (uint32_t)(2 * (PAIR) / N * M | (2 * (PAIR) + 1) / N * M << 16)

/* Whole words of codes, unrolled; then the windows that are left, the last of which may end early. One sum a token would wait for its
 * last addition, so few tokens have several, in turn. R is 1 or 2 tiles at once. */
static inline __attribute__((always_inline)) void tile_dots(const int T, const int M, const int N, const int R, PARAMETERS) {
    const int a_word = M == 4 ? 8 : 4, a_window = DOTS_WINDOW / M * N / 2, turns = T < 4 ? 4 / T : 1, pair = 4 * NM_LANES;
    const int64_t k = j->inputs, step = a_word / a_window * DOTS_WINDOW;
    __m512 kept[2][8] = {0};
    __m512i in[8];
    vu now[2];
    int64_t at = 0;
    for (; at + step <= k; at += step, codes += NM_LANES) {
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) now[r] = *(const vuu *)(codes + r * more_codes);
#pragma GCC unroll 8
        for (int p = 0; p < a_word; p++, values += pair) {
            const int own = p % a_window;
            if (own == 0)
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) in[t] = _mm512_loadu_si512(x + t * j->ldx + at + p / a_window * DOTS_WINDOW);
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) {
                ask_for_pairs(T, values + r * more_values);
                pair_of(T, M, in, &now[r], BASES(own), values + r * more_values, kept[r] + p % turns * T, wrong);
            }
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R && at < k; r++) now[r] = *(const vuu *)(codes + r * more_codes); /* less than a word is left */
    for (; at < k; at += DOTS_WINDOW) {
        const int64_t some = nm_min(DOTS_WINDOW, k - at);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) in[t] = _mm512_maskz_loadu_epi16((__mmask32)((1ull << some) - 1), x + t * j->ldx + at);
        for (int64_t own = 0; own < some / M * N / 2; own++, values += pair)
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) pair_of(T, M, in, &now[r], BASES(own), values + r * more_values, kept[r], wrong);
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
#pragma GCC unroll 4
            for (int turn = 1; turn < turns; turn++) kept[r][t] += kept[r][turn * T + t];
            sums[r * FEW_DOTS + t] = (vf)kept[r][t];
        }
}

typedef void (*tile_dots_fn)(PARAMETERS);
#define TILE_DOTS(T, M, N, R) \
    static void tile_dots_##T##_##M##_##N##_##R(PARAMETERS) { \
        tile_dots(T, M, N, R, j, values, codes, x, sums, more_values, more_codes, wrong); \
    }
#define ALL_DOTS(M, N) TILE_DOTS(1, M, N, 2) \
    TILE_DOTS(1, M, N, 1) TILE_DOTS(2, M, N, 1) TILE_DOTS(3, M, N, 1) TILE_DOTS(4, M, N, 1) \
    TILE_DOTS(5, M, N, 1) TILE_DOTS(6, M, N, 1) TILE_DOTS(7, M, N, 1) TILE_DOTS(8, M, N, 1)
ALL_DOTS(4, 1)
ALL_DOTS(4, 2)
ALL_DOTS(8, 1)
ALL_DOTS(8, 2)
ALL_DOTS(16, 1)
ALL_DOTS(16, 2)
#define NAMES(M, N) {tile_dots_1_##M##_##N##_2, \
    tile_dots_1_##M##_##N##_1, tile_dots_2_##M##_##N##_1, tile_dots_3_##M##_##N##_1, tile_dots_4_##M##_##N##_1, \
    tile_dots_5_##M##_##N##_1, tile_dots_6_##M##_##N##_1, tile_dots_7_##M##_##N##_1, tile_dots_8_##M##_##N##_1}
static const tile_dots_fn tile_dots_for[3][2][FEW_DOTS + 1] = { /* [m][n][tokens], 0: two tiles */
    {NAMES(4, 1), NAMES(4, 2)}, {NAMES(8, 1), NAMES(8, 2)}, {NAMES(16, 1), NAMES(16, 2)},
};
#undef NAMES
#undef PARAMETERS

static int run_few_dots(const nm_job *j, int64_t task, char *scratch) {
    (void)scratch;
    const int64_t first = task * few_tiles_a_task(j), end = nm_min(few_tiles(j), first + few_tiles_a_task(j)), tokens = nm_tokens(j);
    const int64_t a_tile = nm_steps(j) * NM_LANES * 2, words = nm_words(j) * NM_LANES;
    const tile_dots_fn *dots = tile_dots_for[j->m == 4 ? 0 : j->m == 8 ? 1 : 2][j->n - 1];
    vu wrong = {0};
    /* two tiles at once are half of the task from each other, as in few.h */
    const int64_t apart = tokens == 1 && j->groups == 1 ? (end - first) / 2 : 0;
    for (int64_t at = first; at < end - apart; at++) {
        const int tiles = at < first + apart ? 2 : 1;
        const int64_t tile = tiles == 2 ? at : at + apart, group = tile / nm_tiles(j);
        for (int64_t token = 0, some; token < tokens; token += some) {
            vf sums[2 * FEW_DOTS];
            some = nm_min(FEW_DOTS, tokens - token);
            dots[tiles == 2 ? 0 : some](j, (const char *)j->values + tile * a_tile, j->codes + tile * words,
                                        (const uint16_t *)j->x + token * j->ldx + group * j->inputs, sums, apart * a_tile, apart * words, &wrong);
            for (int r = 0; r < tiles; r++) {
                const int64_t row = (tile + r * apart) % nm_tiles(j) * NM_LANES, channel = group * j->rows + row;
                const dots_work w = {.job = j, .channel = channel, .rows = nm_min(NM_LANES, j->rows - row)};
                float start[NM_LANES] = {0};
                if (j->bias) memcpy(start, j->bias + channel, (size_t)w.rows * 4);
                for (int64_t t = 0; t < some; t++) dots_finish(&w, sums[r * FEW_DOTS + t] + load(start), token + t);
            }
        }
    }
    return any(wrong) ? NM_BAD_CODE : NM_OK;
}
#pragma GCC pop_options
#else
static int fits_few_dots(const nm_job *j) { return j->m < 0; }
static int run_few_dots(const nm_job *j, int64_t task, char *scratch) { return (void)j, (void)task, (void)scratch, NM_OK; }
#endif
