/* The product for many tokens whose channels lie innermost, where both ways fit: some of a block's tokens lie in a panel, the
 * others stay as they are, and their loops run as one.
 *
 *     for block along k:  pack some tokens into a panel; lay the others side by side
 *       for tile of 16 rows:  for AT_ONCE of the others, with one or two rows of the tile:
 *         for step:  sums[token][lanes] += value[step][lanes] * x[token][window + place[step][lanes]]      # as lanes.h
 *                    sums[row][:] += value[step][row] * panel[place[step][row]][:]                         # as panel.h
 *
 * The panel's loop waits for loads, one a multiply-add; the other for the pipe that it shares with permutations. Each runs in what
 * the other leaves free: 107 of the processor's 117 GFLOP/s in the caches, where they come to 92 and 82 alone. */

#if V == 16
#define MIXED_LEAST 3          /* vectors of tokens in a panel: with fewer its rows are too short to gain */
#define MIXED_MOST 7           /* with a block of MIXED_BLOCK positions along k the panel takes 28 KiB */
#define MIXED_BLOCK 64         /* a multiple of two windows */
#define MIXED_MOST_THIN 5      /* where a window has 4 kept positions, not 8: longer blocks, since sums are read and written in each */
#define MIXED_BLOCK_THIN 96
#define MIXED_UNITS 26         /* of AT_ONCE tokens in a block, panel and lanes together */
#define MIXED_SUMS (640 << 10) /* bytes of sums that stay in the second-level cache */
_Static_assert(MIXED_UNITS * AT_ONCE - MIXED_MOST_THIN * V <= LANES_TOKENS, "what the panel has no room for goes into lanes");

typedef struct {
    int64_t units, blocks;     /* of AT_ONCE tokens; blocks of them */
    int64_t most;              /* tokens in a block, at most */
    int64_t row_chunks, chunk; /* tasks along rows; rows in each, a multiple of 16 */
    int64_t high;              /* rows whose sums stay in the second-level cache */
    int64_t kept;              /* steps in a window */
    int64_t block, stride;     /* positions along k in a block; floats from one token in lanes to the next, no power of two */
    int64_t vectors;           /* in a panel, at most */
} mixed_plan;

static mixed_plan mixed_plan_of(const nm_job *j) {
    mixed_plan p;
    p.units = nm_up(nm_tokens(j), AT_ONCE);
    const shares shared = shares_of(j, p.units, MIXED_UNITS);
    p.blocks = shared.blocks, p.row_chunks = shared.row_chunks, p.chunk = shared.chunk;
    p.most = nm_up(p.units, p.blocks) * AT_ONCE;
    p.high = nm_up(p.chunk, nm_up(p.chunk * p.most * 4, MIXED_SUMS));
    p.high = nm_up(p.high, NM_LANES) * NM_LANES;
    p.kept = V / j->m * j->n;
    p.block = p.kept == 8 ? MIXED_BLOCK : MIXED_BLOCK_THIN, p.vectors = p.kept == 8 ? MIXED_MOST : MIXED_MOST_THIN;
    p.stride = p.block + NM_LANES;
    return p;
}

/* How a tile's 16 rows go along with the tokens in lanes. */
typedef struct {
    int64_t two, one;    /* units of AT_ONCE tokens that take two rows along; one row */
    int64_t alone, rest; /* rows that go by themselves; units that do */
} pairing;

static pairing pairing_of(int64_t units) {
    if (units <= NM_LANES / 2) return (pairing){units, 0, NM_LANES - 2 * units, 0};
    if (units <= NM_LANES) return (pairing){NM_LANES - units, 2 * units - NM_LANES, 0, 0};
    return (pairing){0, NM_LANES, 0, units - NM_LANES};
}

/* Vectors of tokens in the panel of a block: as many as cost the least, in hundredths of a cycle a step. Measured on a Zen 4. */
static int64_t mixed_vectors(const mixed_plan *p, int64_t tokens) {
    int64_t best = 0, least = INT64_MAX;
    for (int64_t nv = MIXED_LEAST; nv <= p->vectors && nv * V <= tokens; nv++) {
        const int64_t others = tokens - nv * V, tail = others % AT_ONCE;
        const pairing pairs = pairing_of(others / AT_ONCE);
        const int64_t cost = pairs.two * (960 + 203 * nv) + pairs.one * (1030 + 100 * nv) + pairs.alone * (100 + 112 * nv)
                             + pairs.rest * 1150 + (tail ? nm_max(400, 140 * tail) : 0);
        if (others <= LANES_TOKENS && cost < least) least = cost, best = nv;
    }
    return best;
}

/* With fewer tokens there is too little for both; with fewer rows, or thin ones that are short, turning what goes into the panel
 * costs what is gained. Pixels that are read where they lie cost lanes less than windows, which are laid side by side. Measured. */
static int fits_mixed(const nm_job *j) {
    if (!j->channels_last || V % j->m || nm_tokens(j) < 96) return 0;
    const int64_t kept = V / j->m * j->n, k = nm_k(j);
    if (kept == 8) return k >= 2 * V && j->rows >= (!one_pixel(j) ? 48 : k >= 256 ? 128 : 192);
    return kept == 4 && k >= 512 && j->rows >= (one_pixel(j) ? 192 : 96);
}

static int64_t mixed_tasks(const nm_job *j) {
    const mixed_plan p = mixed_plan_of(j);
    return p.blocks * j->groups * p.row_chunks;
}

static int64_t mixed_scratch(const nm_job *j) {
    const mixed_plan p = mixed_plan_of(j);
    const int64_t steps = p.block / j->m * j->n, panel = p.block * p.vectors * V, rows = LANES_TOKENS * p.stride;
    const int64_t sums = nm_min(p.chunk, p.high) * (p.most + AT_ONCE);
    return (panel + rows + sums + 3 * steps * NM_LANES) * 4 + 8 * LINE;
}

/* What the rows of one tile in the panel have in common. */
typedef struct {
    const char *panel;
    float *sums;        /* [row][NV * V] */
    const float *start; /* [row]: what sums begin with, NULL: what they were */
} panel_work;

/* AT_ONCE tokens in lanes, as lanes_of, and ROWS rows of the panel, one after the other. */
static inline __attribute__((always_inline)) void mixed_of(const int NV, const int ROWS, const int KEPT, const lanes_work *w,
        const panel_work *p, int64_t row, const float *x, float *sums, int64_t token) {
    const float *values = w->values;
    const uint32_t *at = w->at;
    vf sum[8][PARTS], in[8];
    lanes_begin(AT_ONCE, w, sums, token, sum);
    for (int64_t end = row + ROWS; row < end; row++) {
        float *to = p->sums + row * NV * V;
        const float *weight = w->values + row;
        const char *panel = p->panel;
        const uint32_t *place = w->at + row;
        vf along[MIXED_MOST];
#pragma GCC unroll 8
        for (int i = 0; i < NV; i++) along[i] = p->start ? splat(p->start[row]) : *(vf *)(to + i * V);
        for (int64_t window = w->windows / ROWS; window; window--, x += V, panel += ROWS * V * NV * V * 4) {
#pragma GCC unroll 8
            for (int t = 0; t < AT_ONCE; t++) in[t] = load(x + t * w->ldx);
#pragma GCC unroll 8
            for (int s = 0; s < KEPT; s++, values += NM_LANES, at += NM_LANES) {
                const vf value = load(values);
                const vu where = *(const vuu *)at;
#pragma GCC unroll 2
                for (int r = 0; r < ROWS; r++, weight += NM_LANES, place += NM_LANES) {
                    const vf one = splat(*weight);
                    const char *from = panel + ((s * ROWS + r) / KEPT * V + (int64_t)*place) * (NV * V * 4);
#pragma GCC unroll 8
                    for (int i = 0; i < AT_ONCE; i++) { /* in turn, so that no queue fills with one kind */
                        if (r == 0) sum[i][0] += value * permuted(in[i], where);
                        if (i < NV) along[i] += one * *(const vf *)(from + i * 4 * V);
                    }
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < NV; i++) *(vf *)(to + i * V) = along[i];
    }
    lanes_end(AT_ONCE, w, sums, token, sum);
}

typedef void (*mixed_fn)(const lanes_work *, const panel_work *, int64_t, const float *, float *, int64_t);
#define MIXED(NV, ROWS, KEPT) \
    static void mixed_##NV##_##ROWS##_##KEPT(const lanes_work *w, const panel_work *p, int64_t row, const float *x, float *sums, int64_t token) { \
        mixed_of(NV, ROWS, KEPT, w, p, row, x, sums, token); \
    }
#define MIXED_ALL(NV) MIXED(NV, 1, 4) MIXED(NV, 1, 8) MIXED(NV, 2, 4) MIXED(NV, 2, 8)
MIXED_ALL(3)
MIXED_ALL(4)
MIXED_ALL(5)
MIXED_ALL(6)
MIXED_ALL(7)
#define NAMES(NV) {{mixed_##NV##_1_4, mixed_##NV##_1_8}, {mixed_##NV##_2_4, mixed_##NV##_2_8}}
static const mixed_fn mixed_for[][2][2] = {NAMES(3), NAMES(4), NAMES(5), NAMES(6), NAMES(7)}; /* [vectors][rows][kept] */
#undef NAMES

/* Tokens of a block: [token0, middle) lie in the panel, [middle, token1) in lanes. */
typedef struct {
    const mixed_plan *plan;
    pairing pairs;
    int64_t token0, middle, token1, nv, whole, tail; /* vectors in the panel; units in lanes, tokens of the last one */
    const char *panel;
    const float *rows; /* of tokens in lanes */
    int together;      /* whether this block along k has an even number of windows, so that two rows can be one after the other */
} mixed_block;

/* All tokens of a block times one tile; next: values that come after these, in lines. */
static void mixed_tile(const mixed_block *b, const lanes_work *w, const panel_work *p, float *sums, uint16_t *places, const uint32_t *codes,
                       int64_t step0, int64_t count, const char *next, int64_t lines) {
    const nm_job *j = w->job;
    const int64_t paired = b->together ? b->pairs.two + b->pairs.one : 0, stride = b->plan->stride, room = b->nv * V;
    int64_t row = 0;
    for (int64_t unit = 0, t = 0; unit < b->whole; unit++, t += AT_ONCE) {
        const float *x = b->rows + t * stride;
        const int full = b->plan->kept == 8;
        if (w->last)
            for (int64_t i = room * unit / b->whole; i < room * (unit + 1) / b->whole; i++) ask_for(w, b->token0 + i);
        for (int64_t l = lines * unit / b->whole; l < lines * (unit + 1) / b->whole; l++) __builtin_prefetch(next + l * LINE);
        if (unit < paired) {
            const int along = unit < b->pairs.two ? 2 : 1;
            mixed_for[b->nv - MIXED_LEAST][along - 1][full](w, p, row, x, sums + t * NM_LANES, b->middle + t);
            row += along;
        } else (full ? lanes_whole : lanes_for[AT_ONCE])(w, x, sums + t * NM_LANES, b->middle + t);
    }
    if (b->tail) {
        const int64_t t = b->whole * AT_ONCE;
        lanes_for[b->tail](w, b->rows + t * stride, sums + t * NM_LANES, b->middle + t);
    }
    if (row < NM_LANES) {
        panel_places(j, codes, step0, count, room * 4, places);
        tile_of[b->nv][0](b->panel, p->sums, w->values, places, count, p->start, p->start != 0, (int)row, next, 0);
    }
}

static int run_mixed(const nm_job *j, int64_t task, char *scratch) {
    const mixed_plan p = mixed_plan_of(j);
    const int64_t chunk = task % p.row_chunks, all = task / p.row_chunks, group = all / p.blocks, block = all % p.blocks;
    const int64_t row0 = chunk * p.chunk, row1 = nm_min(j->rows, row0 + p.chunk);
    const int64_t k = nm_k(j), steps = nm_steps(j), words = nm_words(j), bytes = NM_LANES * nm_value_bytes(j);
    mixed_block b = {.plan = &p, .token0 = p.units * block / p.blocks * AT_ONCE,
                     .token1 = nm_min(nm_tokens(j), p.units * (block + 1) / p.blocks * AT_ONCE)};
    b.nv = mixed_vectors(&p, b.token1 - b.token0), b.middle = b.token0 + b.nv * V;
    const int64_t others = b.token1 - b.middle;
    b.whole = others / AT_ONCE, b.tail = others % AT_ONCE, b.pairs = pairing_of(b.whole);

    float *panel = (float *)(((uintptr_t)scratch + LINE - 1) & ~(uintptr_t)(LINE - 1));
    float *rows = panel + p.block * p.vectors * V;
    float *sums = rows + LANES_TOKENS * p.stride, *lane_sums = sums + nm_min(p.chunk, p.high) * b.nv * V;
    float *wide = sums + nm_min(p.chunk, p.high) * (p.most + AT_ONCE);
    uint32_t *at = (uint32_t *)(wide + p.block / j->m * j->n * NM_LANES);
    uint16_t *places = (uint16_t *)(at + p.block / j->m * j->n * NM_LANES);
    int wrong = 0;
    b.panel = (const char *)panel, b.rows = rows;

    for (int64_t top = row0; top < row1; top += p.high)
        for (int64_t k0 = 0; k0 < k; k0 += p.block) {
            const int64_t k1 = nm_min(k, k0 + p.block), step0 = k0 / j->m * j->n, count = (k1 - k0) / j->m * j->n;
            b.together = (k1 - k0) % (2 * V) == 0;
            pack(j, group, k0, k1, b.token0, b.nv * V, b.nv, panel);
            side_by_side(j, group, k0, k1, b.middle, others, p.stride, rows);
            lanes_work w = {.job = j, .ldx = p.stride, .windows = (k1 - k0) / V, .tail = (k1 - k0) % V, .kept = p.kept,
                            .tail_kept = (k1 - k0) % V / j->m * j->n, .at = at, .last = k1 == k, .ahead = 2 * AT_ONCE};
            for (int64_t row = top; row < nm_min(row1, top + p.high); row += NM_LANES) {
                const int64_t place = group * nm_tiles(j) + row / NM_LANES;
                const char *values = (const char *)j->values + place * steps * bytes, *next = values + (steps + step0) * bytes;
                const uint32_t *codes = j->codes + place * words * NM_LANES;
                const uint32_t *next_codes = codes + (words + step0 * nm_bits(j->m) / 32) * NM_LANES;
                float start[NM_LANES] = {0};
                if (j->bias && !k0) memcpy(start, j->bias + group * j->rows + row, (size_t)nm_min(NM_LANES, j->rows - row) * 4);
                __builtin_prefetch(next_codes);
                __builtin_prefetch(next_codes + NM_LANES);
                wrong |= window_places(j, codes, step0, count, at);
                w.start = k0 ? 0 : start;
                w.channel = group * j->rows + row, w.rows = nm_min(NM_LANES, j->rows - row);
                w.values = expand_values(j, values, j->scales ? j->scales + place * NM_LANES : 0, step0, count, wide);
                const panel_work in_panel = {b.panel, sums + (row - top) * b.nv * V, w.start};
                float *others_sums = lane_sums + (row - top) * (p.most - b.nv * V);
                mixed_tile(&b, &w, &in_panel, others_sums, places, codes, step0, count, next, count * bytes / LINE);
                if (k1 == k) unpack(j, group, row, b.token0, b.nv * V, b.nv, in_panel.sums);
            }
        }
    return wrong ? NM_BAD_CODE : NM_OK;
}
#else
static int fits_mixed(const nm_job *j) { return j->m < 0; }
static int64_t mixed_tasks(const nm_job *j) { return (void)j, 0; }
static int64_t mixed_scratch(const nm_job *j) { return (void)j, 0; }
static int run_mixed(const nm_job *j, int64_t task, char *scratch) { return (void)j, (void)task, (void)scratch, NM_OK; }
#endif
