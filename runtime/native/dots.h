/* The product of bfloat16 values with bfloat16 data, where the processor multiplies and adds two pairs of them in one operation
 * (AVX512-BF16): as lanes.h, with windows of 32 positions and two kept positions at a time. Sums are float32.
 *
 *     for block along k:  rows of x side by side, where taps, strides or paddings scatter them
 *       for tile of 16 rows:  for AT_ONCE tokens:  for 32 neighbours along k:  for each two kept positions:
 *         sums[token][lanes] += value[step][lanes] * x[token][window + place[step][lanes]]
 *                             + value[step + 1][lanes] * x[token][window + place[step + 1][lanes]]
 *
 * Two steps are never of two windows: Python asks for this kernel only where M divides 32 and the steps of every window, the last
 * one too, are even. A step without its pair would multiply a zero with data that nobody kept, which may be infinite. */

#ifdef NM_DOTS
#pragma GCC push_options
#pragma GCC target("avx512bf16")
#define DOTS_WINDOW 32
#ifndef DOTS_KEPT
#define DOTS_KEPT (256 << 10) /* bytes */
#endif

typedef struct {
    const nm_job *job;
    int64_t ldx, windows, tail;          /* whole windows; positions in the one that is left */
    int64_t kept, tail_kept;             /* pairs of steps in a window, and in that one */
    const uint32_t *values, *at;         /* [pair][16]: two of 16 bits each */
    const float *start;                  /* what sums begin with, NULL: what they were */
    int64_t last, channel, rows, ahead;  /* as in lanes_work */
} dots_work;

static int fits_dots(const nm_job *j) { return j->halves != 0; }
static int64_t dots_tasks(const nm_job *j) { return lanes_tasks(j); }

static inline int64_t dots_stride(const lanes_plan *p) { return p->block + DOTS_WINDOW; } /* no power of two */

/* Where all of x stays in the second-level cache, a tile goes along all of k at once, so that weights are read in order. */
static inline int dots_by_rows(const nm_job *j, const lanes_plan *p) { return p->direct && nm_k(j) * p->most * 2 <= DOTS_KEPT; }

static int64_t dots_scratch(const nm_job *j) {
    const lanes_plan p = lanes_plan_of(j);
    const int64_t steps = p.block / j->m * j->n, rows = p.direct ? 0 : p.most * dots_stride(&p) * 2;
    const int64_t sums = p.blocks_k == 1 ? 0 : nm_min(p.chunk, LANES_ROWS) * p.most * 4;
    return rows + sums + steps * NM_LANES * (2 + 2) + 4 * LINE;
}

static inline __attribute__((always_inline)) vf floats_of(__m256i halves) {
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

static inline __attribute__((always_inline)) void dots_finish(const dots_work *w, vf sum, int64_t token) {
    const nm_job *j = w->job;
    const int64_t place = token * j->ldy + w->channel;
    const __mmask16 some = MASK(w->rows);
    if (j->residual) sum += floats_of(_mm256_maskz_loadu_epi16(some, (const uint16_t *)j->residual + place));
    const __m256bh y = _mm512_cvtneps_pbh((__m512)activate(sum, j->activation));
    _mm256_mask_storeu_epi16((uint16_t *)j->y + place, some, (__m256i)y);
}

static inline __attribute__((always_inline)) void dots_ask_for(const dots_work *w, int64_t token) {
    const int64_t place = token * w->job->ldy + w->channel;
    __builtin_prefetch((const uint16_t *)w->job->y + place, 1);
    if (w->job->residual) __builtin_prefetch((const uint16_t *)w->job->residual + place);
}

/* T tokens from ``token`` on, of which x is the first; sums: [T][16], where they lie between blocks along k */
static inline __attribute__((always_inline)) void dots_of(const int T, const int KEPT, const dots_work *w, const uint16_t *x,
        float *sums, int64_t token) {
    const uint32_t *values = w->values, *at = w->at;
    const int64_t kept = KEPT ? KEPT : w->kept;
    __m512 sum[8];
    __m512i in[8];
    if (w->last)
        for (int t = 0; t < T; t++) dots_ask_for(w, token + t + w->ahead);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) sum[t] = (__m512)load(w->start ? w->start : sums + t * NM_LANES);
#define PAIRS(COUNT)                                                                                                        \
    for (int64_t s = 0; s < (COUNT); s++, values += NM_LANES, at += NM_LANES) {                                              \
        const __m512bh value = (__m512bh)_mm512_loadu_si512(values);                                                         \
        const __m512i place = _mm512_loadu_si512(at);                                                                        \
        _Pragma("GCC unroll 8") for (int t = 0; t < T; t++)                                                                  \
            sum[t] = _mm512_dpbf16_ps(sum[t], value, (__m512bh)_mm512_permutexvar_epi16(place, in[t]));                      \
    }
    for (int64_t window = 0; window < w->windows; window++, x += DOTS_WINDOW) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) in[t] = _mm512_loadu_si512(x + t * w->ldx);
        if (KEPT) {
            _Pragma("GCC unroll 8") PAIRS(KEPT)
        } else PAIRS(kept)
    }
    if (w->tail) {
        const __mmask32 some = (1u << w->tail) - 1;
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) in[t] = _mm512_maskz_loadu_epi16(some, x + t * w->ldx);
        PAIRS(w->tail_kept)
    }
#undef PAIRS
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        if (w->last) dots_finish(w, (vf)sum[t], token + t);
        else store(sums + t * NM_LANES, (vf)sum[t]);
    }
}

typedef void (*dots_fn)(const dots_work *, const uint16_t *, float *, int64_t);
#define DOTS(T) \
    static void dots_##T(const dots_work *w, const uint16_t *x, float *sums, int64_t token) { dots_of(T, 0, w, x, sums, token); }
DOTS(1)
DOTS(2)
DOTS(3)
DOTS(4)
DOTS(5)
DOTS(6)
DOTS(7)
DOTS(8)
static const dots_fn dots_for[] = {0, dots_1, dots_2, dots_3, dots_4, dots_5, dots_6, dots_7, dots_8};

static void dots_whole(const dots_work *w, const uint16_t *x, float *sums, int64_t token) { dots_of(AT_ONCE, 8, w, x, sums, token); }

/* The places of values of two steps, when those of one row are to lie beside each other. */
#define BESIDE ((__m512i)(vu){0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, \
                              0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f})

/* The next two codes of every row, in 16 bits each; of 2 bits, by a table. */
static inline __attribute__((always_inline)) vu pair_codes(const int bits, vu now) {
    const vu twos = {0x0, 0x1, 0x2, 0x3, 0x10000, 0x10001, 0x10002, 0x10003,
                     0x20000, 0x20001, 0x20002, 0x20003, 0x30000, 0x30001, 0x30002, 0x30003};
    const uint32_t mask = (1u << bits) - 1;
    return bits == 2 ? (vu)_mm512_permutexvar_epi32((__m512i)now, (__m512i)twos) : (now & mask) | (now >> bits & mask) << 16;
}

/* Codes beyond ``last`` are clamped, so that nothing else is ever read, and ``wrong`` is set: `clamped` of two at once. */
static inline __attribute__((always_inline)) vu within(vu code, int last, vu *wrong) {
    const vu found = (vu)_mm512_min_epu16((__m512i)code, _mm512_set1_epi16((short)last));
    *wrong |= code ^ found;
    return found;
}

/* Values of two steps beside each other, for each of 16 rows. */
static inline void pair_values(int64_t pairs, const char *values, uint32_t *to) {
    for (int64_t p = 0; p < pairs; p++) {
        const __m512i both = _mm512_loadu_si512(values + p * 4 * NM_LANES);
        _mm512_storeu_si512(to + p * NM_LANES, _mm512_permutexvar_epi16(BESIDE, both));
    }
}

/* Where the groups of a pair of steps begin in their window, in 16 bits each. */
static void pair_bases(const nm_job *j, uint32_t *bases) {
    for (int64_t p = 0; p < DOTS_WINDOW / j->m * j->n / 2; p++)
        bases[p] = (uint32_t)(2 * p / j->n * j->m | (2 * p + 1) / j->n * j->m << 16);
}

/* at[pair][lane]: places in windows, the first of which begins where the first group does, in 16 bits each */
static inline __attribute__((always_inline)) int pair_places_of(const nm_job *j, const int bits, const int checked, const uint32_t *codes,
        const uint32_t *bases, int64_t step0, int64_t count, uint32_t *at) {
    const int64_t a_word = 32 / bits, a_window = DOTS_WINDOW / j->m * j->n / 2;
    int64_t left = a_word - step0 % a_word, in_window = 0;
    const uint32_t *word = codes + step0 / a_word * NM_LANES;
    vu now = *(const vuu *)word >> (uint32_t)((a_word - left) * bits), wrong = {0};
    for (int64_t pair = 0; pair < count / 2; pair++, left -= 2) {
        if (!left) word += NM_LANES, now = *(const vuu *)word, left = a_word;
        vu code = pair_codes(bits, now);
        if (checked) code = within(code, (int)j->m - 1, &wrong);
        *(vuu *)(at + pair * NM_LANES) = code + bases[in_window];
        now >>= 2 * bits;
        if (++in_window == a_window) in_window = 0;
    }
    return checked && any(wrong);
}

static int pair_places(const nm_job *j, const uint32_t *codes, const uint32_t *bases, int64_t step0, int64_t count, uint32_t *at) {
    if (j->m == 4) return pair_places_of(j, 2, 0, codes, bases, step0, count, at);
    if (j->m == 16) return pair_places_of(j, 4, 0, codes, bases, step0, count, at);
    if (j->m == 2) return pair_places_of(j, 2, 1, codes, bases, step0, count, at);
    if (j->m == 8) return pair_places_of(j, 4, 1, codes, bases, step0, count, at);
    return pair_places_of(j, 8, 1, codes, bases, step0, count, at);
}

/* positions [k0, k1) of some tokens, a row each; zeros where a tap lies outside an image */
static void halves_side_by_side(const nm_job *j, int64_t group, int64_t k0, int64_t k1, int64_t token0, int64_t tokens, int64_t stride,
                                uint16_t *to) {
    const float *from[LANES_TOKENS];
    for (int64_t k = k0; k < k1;) {
        const int64_t tap = k / j->inputs, c0 = k % j->inputs, count = nm_min(j->inputs - c0, k1 - k);
        pixels_under(j, group, tap, token0, tokens, tokens, from);
        for (int64_t t = 0; t < tokens; t++) {
            uint16_t *row = to + t * stride + k - k0;
            if (from[t]) memcpy(row, (const uint16_t *)j->x + (from[t] - j->x) + c0, (size_t)count * 2);
            else memset(row, 0, (size_t)count * 2);
        }
        k += count;
    }
}

/* A task: so many tokens and rows of one conv group. */
typedef struct {
    const nm_job *job;
    lanes_plan plan;
    int64_t group, token0, tokens, row0, row1;
    uint32_t *at, *values; /* of a tile and a block along k */
    float *sums;
    uint16_t *rows; /* of x, where it is not read where it lies */
    uint32_t bases[DOTS_WINDOW / 2];
} dots_task;

/* One tile in one block along k; sums: where those of all tokens lie in between. */
static int dots_tile(const dots_task *d, int64_t row, int64_t k0, float *sums) {
    const nm_job *j = d->job;
    const lanes_plan *p = &d->plan;
    const int64_t k = nm_k(j), k1 = nm_min(k, k0 + p->block), step0 = k0 / j->m * j->n, count = (k1 - k0) / j->m * j->n;
    const int64_t steps = nm_steps(j), bytes = NM_LANES * 2, place = d->group * nm_tiles(j) + row / NM_LANES;
    const int64_t after = k1 - k0 == k || !dots_by_rows(j, p) ? steps * bytes : count * bytes; /* what is read next lies so far on */
    const char *stored = (const char *)j->values + (place * steps + step0) * bytes, *next = stored + after;
    const uint16_t *x = p->direct ? (const uint16_t *)j->x + d->token0 * j->ldx + d->group * j->inputs + k0 : d->rows;
    float start[NM_LANES] = {0};
    if (j->bias) memcpy(start, j->bias + d->group * j->rows + row, (size_t)nm_min(NM_LANES, j->rows - row) * 4);
    const dots_work w = {.job = j, .ldx = p->direct ? j->ldx : dots_stride(p), .windows = (k1 - k0) / DOTS_WINDOW,
                         .tail = (k1 - k0) % DOTS_WINDOW, .kept = DOTS_WINDOW / j->m * j->n / 2,
                         .tail_kept = (k1 - k0) % DOTS_WINDOW / j->m * j->n / 2, .values = d->values, .at = d->at,
                         .start = k0 ? 0 : start, .last = k1 == k, .channel = d->group * j->rows + row,
                         .rows = nm_min(NM_LANES, j->rows - row), .ahead = k1 - k0 > 8 * DOTS_WINDOW ? 0 : 2 * AT_ONCE};
    const int wrong = pair_places(j, j->codes + place * nm_words(j) * NM_LANES, d->bases, step0, count, d->at);
    pair_values(count / 2, stored, d->values);
    const int64_t lines = count * bytes / LINE;
    for (int64_t t = 0, some; t < d->tokens; t += some) {
        some = nm_min(AT_ONCE, d->tokens - t);
        for (int64_t l = lines * t / d->tokens; l < lines * (t + some) / d->tokens; l++) __builtin_prefetch(next + l * LINE);
        (some == AT_ONCE && w.kept == 8 ? dots_whole : dots_for[some])(&w, x + t * w.ldx, sums + t * NM_LANES, d->token0 + t);
    }
    return wrong;
}

static int run_dots(const nm_job *j, int64_t task, char *scratch) {
    const lanes_plan p = lanes_plan_of(j);
    const int64_t chunk = task % p.row_chunks, all = task / p.row_chunks, block = all % p.blocks, k = nm_k(j);
    const int64_t token0 = p.units * block / p.blocks * AT_ONCE, token1 = nm_min(nm_tokens(j), p.units * (block + 1) / p.blocks * AT_ONCE);
    const int64_t room = p.block / j->m * j->n / 2 * NM_LANES;
    dots_task d = {.job = j, .plan = p, .group = all / p.blocks, .token0 = token0, .tokens = token1 - token0, .row0 = chunk * p.chunk,
                   .row1 = nm_min(j->rows, (chunk + 1) * p.chunk)};
    d.at = (uint32_t *)(((uintptr_t)scratch + LINE - 1) & ~(uintptr_t)(LINE - 1));
    d.values = d.at + room, d.sums = (float *)(d.values + room);
    d.rows = (uint16_t *)(d.sums + (p.blocks_k == 1 ? 0 : nm_min(p.chunk, LANES_ROWS) * p.most));
    pair_bases(j, d.bases);
    int wrong = 0;
    if (dots_by_rows(j, &p)) {
        for (int64_t row = d.row0; row < d.row1; row += NM_LANES)
            for (int64_t k0 = 0; k0 < k; k0 += p.block) wrong |= dots_tile(&d, row, k0, d.sums);
    } else {
        for (int64_t top = d.row0; top < d.row1; top += LANES_ROWS)
            for (int64_t k0 = 0; k0 < k; k0 += p.block) {
                if (!p.direct && (top == d.row0 || p.blocks_k > 1))
                    halves_side_by_side(j, d.group, k0, nm_min(k, k0 + p.block), token0, d.tokens, dots_stride(&p), d.rows);
                for (int64_t row = top; row < nm_min(d.row1, top + LANES_ROWS); row += NM_LANES)
                    wrong |= dots_tile(&d, row, k0, d.sums + (row - top) * p.most);
            }
    }
    return wrong ? NM_BAD_CODE : NM_OK;
}
#pragma GCC pop_options
#else
static int fits_dots(const nm_job *j) { return j->m < 0; }
static int64_t dots_tasks(const nm_job *j) { return (void)j, 0; }
static int64_t dots_scratch(const nm_job *j) { return (void)j, 0; }
static int run_dots(const nm_job *j, int64_t task, char *scratch) { return (void)j, (void)task, (void)scratch, NM_OK; }
#endif
