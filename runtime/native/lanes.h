/* The product for many tokens whose channels lie innermost: 16 outputs lie in lanes, so nothing is transposed on the way in or out.
 *
 *     for block along k:  rows of x side by side, where taps, strides or paddings scatter them
 *       for tile of 16 rows:  for AT_ONCE tokens:  for V neighbours along k:  for each kept position:
 *         sums[token][lanes] += value[step][lanes] * x[token][window + place[step][lanes]]    # chosen by a permutation
 *
 * A multiply-add and a permutation share three of the processor's pipes, so the loop comes to 3/4 of the peak. The panel's comes
 * to more, but turning x and y costs it the difference, and much more where k is short. M must divide V: a group lies in a window. */

#if V > 4
#define AT_ONCE (8 / PARTS) /* tokens: their sums and windows fill the registers */
#define LANES_STEPS 128     /* in a block along k: values and places of a tile stay in the first-level cache */
#define LANES_BLOCK 1024    /* positions along k in a block, at most */
#define LANES_TOKENS 128    /* in a block */
#define LANES_ROWS 1024     /* whose sums stay in the second-level cache, where k has several blocks */

typedef struct {
    int64_t block, blocks_k;   /* positions along k in a block; how many */
    int64_t units, blocks;     /* of AT_ONCE tokens; blocks of them */
    int64_t most;              /* tokens in a block */
    int64_t row_chunks, chunk; /* tasks along rows; rows in each, a multiple of 16 */
    int64_t direct;            /* x is read where it lies */
} lanes_plan;

/* What the panel pays for turning x and y is, by the kept weight, 1 / (rows * density) and 1 / (k * density): beyond a bound it
 * loses. Measured; lower where few tokens make narrow panels, higher where a window is loaded for one or two steps. */
static int fits_lanes(const nm_job *j) {
    if (!j->channels_last || V % j->m) return 0;
    const double turning = (1.0 / (double)j->rows + 1.0 / (double)nm_k(j)) * (double)j->m / (double)j->n;
    const int64_t kept = V / j->m * j->n; /* steps of a window */
    const double wide = V == 16 ? 0.0085 : 0.03, narrow = V == 16 ? 0.003 : wide, thin = 0.08 / (double)(kept * kept);
    return turning > (thin > wide ? thin : nm_tokens(j) <= 5 * V ? narrow : wide);
}

/* A token is one pixel of x, in the same order. */
static inline int one_pixel(const nm_job *j) {
    return j->kernel_h * j->kernel_w * j->stride_h * j->stride_w == 1 && !j->pad_h && !j->pad_w;
}

static lanes_plan lanes_plan_of(const nm_job *j) {
    lanes_plan p;
    const int64_t k = nm_k(j);
    const int64_t steps = j->halves ? 2 * LANES_STEPS : LANES_STEPS, window = j->halves ? 2 * NM_LANES : NM_LANES;
    p.blocks_k = nm_up(k, nm_min(LANES_BLOCK, steps * j->m / j->n));
    p.block = nm_up(nm_up(k, p.blocks_k), window) * window;
    p.blocks_k = nm_up(k, p.block);
    p.units = nm_up(nm_tokens(j), AT_ONCE);
    const shares shared = shares_of(j, p.units, LANES_TOKENS / AT_ONCE);
    p.blocks = shared.blocks, p.row_chunks = shared.row_chunks, p.chunk = shared.chunk;
    p.most = nm_up(p.units, p.blocks) * AT_ONCE;
    p.direct = one_pixel(j);
    return p;
}

static int64_t lanes_tasks(const nm_job *j) {
    const lanes_plan p = lanes_plan_of(j);
    return p.blocks * j->groups * p.row_chunks;
}

static inline int64_t lanes_stride(const lanes_plan *p) { return p->block + NM_LANES; } /* no power of two */

static int64_t lanes_scratch(const nm_job *j) {
    const lanes_plan p = lanes_plan_of(j);
    const int64_t steps = p.block / j->m * j->n, rows = p.direct ? 0 : p.most * lanes_stride(&p);
    const int64_t sums = p.blocks_k == 1 ? 0 : nm_min(p.chunk, LANES_ROWS) * p.most;
    return (rows + sums + 2 * steps * NM_LANES) * 4 + 4 * LINE;
}

/* What AT_ONCE tokens of one tile and one block along k have in common. */
typedef struct {
    const nm_job *job;
    int64_t ldx, windows, tail;    /* whole windows of V positions; positions in the one that is left */
    int64_t kept, tail_kept;       /* steps in a window, and in that one */
    const float *values, *start;   /* [step][16]; what sums begin with, NULL: what they were */
    const uint32_t *at;            /* [step][16]: places in the window */
    int64_t last, channel, rows;   /* y is written: from this channel on, so many */
    int64_t ahead;                 /* how many tokens before they are due its lines are asked for */
} lanes_work;

static inline __attribute__((always_inline)) vf permuted(vf x, vu at) {
#if V == 16
    return (vf)_mm512_permutexvar_ps((__m512i)at, (__m512)x);
#else
    return (vf)_mm256_permutevar8x32_ps((__m256)x, (__m256i)at);
#endif
}

static inline __attribute__((always_inline)) void lanes_finish(const lanes_work *w, vf sum, int64_t token, int64_t lane) {
    const nm_job *j = w->job;
    const int64_t place = token * j->ldy + w->channel + lane, some = nm_min(V, w->rows - lane);
    if (some == V) {
        if (j->residual) sum += load(j->residual + place);
        store(j->y + place, activate(sum, j->activation));
    } else if (some > 0) {
        if (j->residual) sum += load_some(j->residual + place, some);
        store_some(j->y + place, activate(sum, j->activation), some);
    }
}

/* The lines that `lanes_finish` reads and writes lie far apart, which no prefetcher sees. */
static inline __attribute__((always_inline)) void ask_for(const lanes_work *w, int64_t token) {
    const int64_t place = token * w->job->ldy + w->channel;
    __builtin_prefetch(w->job->y + place, 1);
    if (w->job->residual) __builtin_prefetch(w->job->residual + place);
}

/* What T tokens from ``token`` on begin with; sums: [T][16], where they lie between blocks along k. */
static inline __attribute__((always_inline)) void lanes_begin(const int T, const lanes_work *w, const float *sums, int64_t token, vf sum[][PARTS]) {
    if (w->last)
        for (int t = 0; t < T; t++) ask_for(w, token + t + w->ahead);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) sum[t][part] = load(w->start ? w->start + part * V : sums + t * NM_LANES + part * V);
}

static inline __attribute__((always_inline)) void lanes_end(const int T, const lanes_work *w, float *sums, int64_t token, vf sum[][PARTS]) {
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
            if (w->last) lanes_finish(w, sum[t][part], token + t, part * V);
            else store(sums + t * NM_LANES + part * V, sum[t][part]);
        }
}

/* T tokens from ``token`` on, of which x is the first */
static inline __attribute__((always_inline)) void lanes_of(const int T, const int KEPT, const lanes_work *w, const float *x, float *sums, int64_t token) {
    const float *values = w->values;
    const uint32_t *at = w->at;
    vf sum[8][PARTS], in[8];
    lanes_begin(T, w, sums, token, sum);
    const int64_t kept = KEPT ? KEPT : w->kept;
#define STEPS(COUNT)                                                                                                        \
    for (int64_t s = 0; s < (COUNT); s++, values += NM_LANES, at += NM_LANES)                                                \
        _Pragma("GCC unroll 2") for (int part = 0; part < PARTS; part++) {                                                   \
            const vf value = load(values + part * V);                                                                        \
            const vu place = *(const vuu *)(at + part * V);                                                                  \
            _Pragma("GCC unroll 8") for (int t = 0; t < T; t++) sum[t][part] += value * permuted(in[t], place);              \
        }
    for (int64_t window = 0; window < w->windows; window++, x += V) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) in[t] = load(x + t * w->ldx);
        if (KEPT) {
            _Pragma("GCC unroll 8") STEPS(KEPT)
        } else STEPS(kept)
    }
    if (w->tail) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) in[t] = load_some(x + t * w->ldx, w->tail);
        STEPS(w->tail_kept)
    }
#undef STEPS
    lanes_end(T, w, sums, token, sum);
}

typedef void (*lanes_fn)(const lanes_work *, const float *, float *, int64_t);
#define LANES(T) \
    static void lanes_##T(const lanes_work *w, const float *x, float *sums, int64_t token) { lanes_of(T, 0, w, x, sums, token); }
LANES(1)
LANES(2)
LANES(3)
LANES(4)
#if AT_ONCE > 4
LANES(5)
LANES(6)
LANES(7)
LANES(8)
static const lanes_fn lanes_for[] = {0, lanes_1, lanes_2, lanes_3, lanes_4, lanes_5, lanes_6, lanes_7, lanes_8};
#else
static const lanes_fn lanes_for[] = {0, lanes_1, lanes_2, lanes_3, lanes_4};
#endif

static void lanes_whole(const lanes_work *w, const float *x, float *sums, int64_t token) { lanes_of(AT_ONCE, 8, w, x, sums, token); }

/* at[step][lane]: places in windows of V, the first of which begins where the first group does */
static inline __attribute__((always_inline)) int windows_of(const nm_job *j, const int bits, const int checked, const uint32_t *codes,
        int64_t step0, int64_t count, uint32_t *at) {
    const int a_word = 32 / bits;
    const uint32_t mask = (1u << bits) - 1, last = (uint32_t)j->m - 1;
    vu wrong = {0};
    for (int part = 0; part < PARTS; part++) {
        int64_t left = a_word - step0 % a_word, kept = 0;
        uint32_t base = 0;
        const uint32_t *word = codes + step0 / a_word * NM_LANES + part * V;
        uint32_t *to = at + part * V;
        vu now = *(const vuu *)word >> (uint32_t)((a_word - left) * bits);
        for (int64_t step = 0; step < count; step++, to += NM_LANES) {
            if (!left) word += NM_LANES, now = *(const vuu *)word, left = a_word;
            vu code = now & mask;
            if (checked) code = clamped(code, last, &wrong);
            *(vuu *)to = code + base;
            now >>= bits;
            left--;
            if (++kept == j->n) kept = 0, base = (base + (uint32_t)j->m) % V;
        }
    }
    return checked && any(wrong);
}

static int window_places(const nm_job *j, const uint32_t *codes, int64_t step0, int64_t count, uint32_t *at) {
    if (j->m == 4) return windows_of(j, 2, 0, codes, step0, count, at);
    if (j->m == 16) return windows_of(j, 4, 0, codes, step0, count, at);
    return windows_of(j, nm_bits(j->m), 1, codes, step0, count, at);
}

/* ``from`` NULL: zeros */
static inline __attribute__((always_inline)) void copy_row(float *to, const float *from, int64_t count) {
    int64_t i = 0;
    for (; i + V <= count; i += V) store(to + i, from ? load(from + i) : splat(0));
    if (i < count) store_some(to + i, from ? load_some(from + i, count - i) : splat(0), count - i);
}

/* positions [k0, k1) of some tokens, a row each; zeros where a tap lies outside an image */
static void side_by_side(const nm_job *j, int64_t group, int64_t k0, int64_t k1, int64_t token0, int64_t tokens, int64_t stride, float *to) {
    const float *from[LANES_TOKENS];
    for (int64_t k = k0; k < k1;) {
        const int64_t tap = k / j->inputs, c0 = k % j->inputs, count = nm_min(j->inputs - c0, k1 - k);
        pixels_under(j, group, tap, token0, tokens, tokens, from);
        for (int64_t t = 0; t < tokens; t++) copy_row(to + t * stride + k - k0, from[t] ? from[t] + c0 : 0, count);
        k += count;
    }
}

static int run_lanes(const nm_job *j, int64_t task, char *scratch) {
    const lanes_plan p = lanes_plan_of(j);
    const int64_t chunk = task % p.row_chunks, all = task / p.row_chunks, group = all / p.blocks, block = all % p.blocks;
    const int64_t token0 = p.units * block / p.blocks * AT_ONCE, token1 = nm_min(nm_tokens(j), p.units * (block + 1) / p.blocks * AT_ONCE);
    const int64_t row0 = chunk * p.chunk, row1 = nm_min(j->rows, row0 + p.chunk), tokens = token1 - token0;
    const int64_t k = nm_k(j), steps = nm_steps(j), words = nm_words(j), bytes = NM_LANES * nm_value_bytes(j);

    float *rows = (float *)(((uintptr_t)scratch + LINE - 1) & ~(uintptr_t)(LINE - 1));
    float *sums = rows + (p.direct ? 0 : p.most * lanes_stride(&p));
    float *wide = sums + (p.blocks_k == 1 ? 0 : nm_min(p.chunk, LANES_ROWS) * p.most);
    uint32_t *at = (uint32_t *)(wide + p.block / j->m * j->n * NM_LANES);
    int wrong = 0;

    for (int64_t top = row0; top < row1; top += LANES_ROWS)
        for (int64_t k0 = 0; k0 < k; k0 += p.block) {
            const int64_t k1 = nm_min(k, k0 + p.block), step0 = k0 / j->m * j->n, count = (k1 - k0) / j->m * j->n;
            const float *x = p.direct ? j->x + token0 * j->ldx + group * j->inputs + k0 : rows;
            if (!p.direct && (top == row0 || p.blocks_k > 1)) side_by_side(j, group, k0, k1, token0, tokens, lanes_stride(&p), rows);
            lanes_work w = {.job = j, .ldx = p.direct ? j->ldx : lanes_stride(&p), .windows = (k1 - k0) / V, .tail = (k1 - k0) % V,
                            .kept = V / j->m * j->n, .tail_kept = (k1 - k0) % V / j->m * j->n, .at = at, .last = k1 == k,
                            .ahead = k1 - k0 > 8 * V ? 0 : 2 * AT_ONCE};
            for (int64_t row = top; row < nm_min(row1, top + LANES_ROWS); row += NM_LANES) {
                const int64_t place = group * nm_tiles(j) + row / NM_LANES;
                const char *values = (const char *)j->values + place * steps * bytes, *next = values + (steps + step0) * bytes;
                float start[NM_LANES] = {0}, *tile_sums = sums + (row - top) * p.most;
                if (j->bias) memcpy(start, j->bias + group * j->rows + row, (size_t)nm_min(NM_LANES, j->rows - row) * 4);
                w.start = k0 ? 0 : start;
                w.channel = group * j->rows + row, w.rows = nm_min(NM_LANES, j->rows - row);
                wrong |= window_places(j, j->codes + place * words * NM_LANES, step0, count, at);
                w.values = expand_values(j, values, j->scales ? j->scales + place * NM_LANES : 0, step0, count, wide);
                const int64_t lines = count * bytes / LINE;
                for (int64_t t = 0, some; t < tokens; t += some) {
                    some = nm_min(AT_ONCE, tokens - t);
                    for (int64_t l = lines * t / tokens; l < lines * (t + some) / tokens; l++) __builtin_prefetch(next + l * LINE);
                    (some == AT_ONCE && w.kept == 8 ? lanes_whole : lanes_for[some])(&w, x + t * w.ldx, tile_sums + t * NM_LANES, token0 + t);
                }
            }
        }
    return wrong ? NM_BAD_CODE : NM_OK;
}
#else
static int fits_lanes(const nm_job *j) { return j->m < 0; }
static int64_t lanes_tasks(const nm_job *j) { return (void)j, 0; }
static int64_t lanes_scratch(const nm_job *j) { return (void)j, 0; }
static int run_lanes(const nm_job *j, int64_t task, char *scratch) { return (void)j, (void)task, (void)scratch, NM_OK; }
#endif
