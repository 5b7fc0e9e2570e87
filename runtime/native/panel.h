/* The product for many tokens. A panel holds a block of x along k, for up to MOST * V tokens, transposed: a row for each
 * position along k. Every kept weight is one broadcast and, for every vector of tokens, one multiply-add from the panel at the
 * place that its code names, so all patterns run the same loop at the speed of the multiply-add from the first-level cache.
 *
 *     for block along k:  pack the panel
 *       for tile of 16 rows:  sums[row][:] += value[step][row] * panel[place[step][row]][:]   # in registers along the block
 *         after the last block:  + residual, activation, into y (turned back where y is channels-last)
 */

#define LINE 64
#define ROW_BLOCK 1024 /* rows whose sums stay in the second-level cache */
#define KEPT_PANEL (2 << 20) /* bytes of x packed once for all row blocks; packed anew for each if it is more */

typedef struct {
    int64_t block, most;         /* positions along k in a block; vectors of tokens in a panel */
    int64_t blocks;              /* of tokens */
    int64_t vectors;             /* in all */
    int64_t row_chunks, chunk;   /* tasks along rows; rows in each, a multiple of 16 */
    int64_t keep;                /* the whole of x is packed once a task */
} plan;

static plan plan_of(const nm_job *j) {
    plan p;
    const int64_t k = nm_k(j);
    const int thin = j->n * 8 <= j->m; /* few weights in a block: longer blocks, narrower panels */
    p.most = thin ? MOST_THIN : MOST;
    p.block = nm_max(1, (thin ? BLOCK_THIN : BLOCK) / j->m) * j->m;
    p.block = nm_up(nm_up(k, nm_up(k, p.block)), j->m) * j->m; /* of equal length */
    p.vectors = nm_up(nm_tokens(j), V);
    const shares shared = shares_of(j, p.vectors, p.most);
    p.blocks = shared.blocks, p.row_chunks = shared.row_chunks, p.chunk = shared.chunk;
    p.keep = p.chunk > ROW_BLOCK && k * p.most * V * 4 <= KEPT_PANEL;
    return p;
}

static int64_t panel_tasks(const nm_job *j) {
    const plan p = plan_of(j);
    return p.blocks * j->groups * p.row_chunks;
}

static int64_t panel_scratch(const nm_job *j) {
    const plan p = plan_of(j);
    const int64_t width = p.most * V * 4, steps = p.block / j->m * j->n;
    const int64_t panel = (p.keep ? nm_k(j) : p.block) * width, sums = nm_min(p.chunk, ROW_BLOCK) * width;
    return panel + sums + steps * NM_LANES * 6 + 4 * LINE;
}

/* One tile: rows ``from_row`` to 16, ``count`` steps, NV vectors of tokens, the last of which may be HALF a vector. Rows go R at a
 * time, so that short ones fill the pipeline. */
#define TILE(NAME, NV, R, HALF)                                                                                              \
    static void NAME(const char *panel, float *sums, const float *values, const uint16_t *at, int64_t count,                 \
                     const float *start, int first, int from_row, const char *next, int64_t lines) {                         \
        for (int row = from_row; row < NM_LANES; row += R) {                                                                         \
            for (int64_t l = row * lines / NM_LANES; l < (row + R) * lines / NM_LANES; l++) __builtin_prefetch(next + l * LINE); \
            float *to = sums + row * NV * V;                                                                                  \
            vf sum[R][NV];                                                                                                    \
            vh half[R];                                                                                                       \
            _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {                                                             \
                _Pragma("GCC unroll 16") for (int i = 0; i < NV - HALF; i++)                                                  \
                    sum[r][i] = first ? splat(start[row + r]) : *(vf *)(to + (r * NV + i) * V);                               \
                if (HALF) half[r] = first ? LOWER(splat(start[row + r])) : *(vh *)(to + (r * NV + NV - 1) * V);                \
            }                                                                                                                 \
            for (int64_t s = 0; s < count; s++) {                                                                             \
                _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {                                                         \
                    const vf weight = splat(values[s * NM_LANES + row + r]);                                                  \
                    const char *from = panel + at[s * NM_LANES + row + r];                                                    \
                    _Pragma("GCC unroll 16") for (int i = 0; i < NV - HALF; i++) sum[r][i] += weight * *(const vf *)(from + i * 4 * V); \
                    if (HALF) half[r] += LOWER(weight) * *(const vh *)(from + (NV - 1) * 4 * V);                              \
                }                                                                                                             \
            }                                                                                                                 \
            _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {                                                             \
                _Pragma("GCC unroll 16") for (int i = 0; i < NV - HALF; i++) *(vf *)(to + (r * NV + i) * V) = sum[r][i];       \
                if (HALF) *(vh *)(to + (r * NV + NV - 1) * V) = half[r];                                                      \
            }                                                                                                                 \
        }                                                                                                                     \
    }

typedef void (*tile_fn)(const char *, float *, const float *, const uint16_t *, int64_t, const float *, int, int, const char *, int64_t);

#if V == 16 /* half of a smaller vector takes as long as the whole */
#define TILES(NV, R) TILE(tile_##NV, NV, R, 0) TILE(tile_##NV##_half, NV, R, 1)
#define NAMES(NV) {tile_##NV, tile_##NV##_half}
#else
#define TILES(NV, R) TILE(tile_##NV, NV, R, 0)
#define NAMES(NV) {tile_##NV, tile_##NV}
#endif

TILES(1, 4)
TILES(2, 4)
TILES(3, 2)
TILES(4, 2)
TILES(5, 1)
TILES(6, 1)
TILES(7, 1)
#if MOST > 7
TILES(8, 1)
#endif
#if MOST > 8
TILES(9, 1)
TILES(10, 1)
#endif

static const tile_fn tile_of[][2] = { /* [vectors][the last is half] */
    {0, 0}, NAMES(1), NAMES(2), NAMES(3), NAMES(4), NAMES(5), NAMES(6), NAMES(7),
#if MOST > 7
    NAMES(8),
#endif
#if MOST > 8
    NAMES(9), NAMES(10),
#endif
};
#undef NAMES

static int run_panel(const nm_job *j, int64_t task, char *scratch) {
    const plan p = plan_of(j);
    const int64_t chunk = task % p.row_chunks, unit = task / p.row_chunks;
    const int64_t group = unit / p.blocks, token_block = unit % p.blocks;
    const int64_t first_vector = p.vectors * token_block / p.blocks, end_vector = p.vectors * (token_block + 1) / p.blocks;
    const int64_t nv = end_vector - first_vector, width = nv * V * 4;
    const int64_t token0 = first_vector * V, tokens = nm_min(nm_tokens(j) - token0, nv * V);
    const int64_t row0 = chunk * p.chunk, row1 = nm_min(j->rows, row0 + p.chunk);
    const int64_t k = nm_k(j), steps = nm_steps(j), words = nm_words(j), block_steps = p.block / j->m * j->n;

    char *panel = (char *)(((uintptr_t)scratch + LINE - 1) & ~(uintptr_t)(LINE - 1));
    float *sums = (float *)(panel + (p.keep ? k : p.block) * p.most * V * 4);
    float *wide = sums + nm_min(p.chunk, ROW_BLOCK) * p.most * V;
    uint16_t *at = (uint16_t *)(wide + block_steps * NM_LANES);
    const tile_fn tile = tile_of[nv][tokens <= nv * V - V / 2];
    int wrong = 0;

    for (int64_t top = row0; top < row1; top += ROW_BLOCK) {
        const int64_t bottom = nm_min(row1, top + ROW_BLOCK);
        for (int64_t k0 = 0; k0 < k; k0 += p.block) {
            const int64_t k1 = nm_min(k, k0 + p.block), step0 = k0 / j->m * j->n, count = (k1 - k0) / j->m * j->n;
            char *here = p.keep ? panel + k0 * width : panel;
            if (!p.keep || top == row0) pack(j, group, k0, k1, token0, tokens, nv, (float *)here);
            for (int64_t row = top; row < bottom; row += NM_LANES) {
                const int64_t place = group * nm_tiles(j) + row / NM_LANES;
                const char *values = (const char *)j->values + place * steps * NM_LANES * nm_value_bytes(j);
                const char *next = values + (steps + step0) * NM_LANES * nm_value_bytes(j);
                __builtin_prefetch(j->codes + (place + 1) * words * NM_LANES + step0 * nm_bits(j->m) / 32 * NM_LANES);
                __builtin_prefetch(j->codes + (place + 1) * words * NM_LANES + step0 * nm_bits(j->m) / 32 * NM_LANES + NM_LANES);
                const float *scales = j->scales ? j->scales + place * NM_LANES : 0;
                float start[NM_LANES] = {0}, *tile_sums = sums + (row - top) * nv * V;
                if (j->bias && !k0) memcpy(start, j->bias + group * j->rows + row, (size_t)nm_min(NM_LANES, j->rows - row) * 4);
                wrong |= panel_places(j, j->codes + place * words * NM_LANES, step0, count, width, at);
                const float *floats = expand_values(j, values, scales, step0, count, wide);
                tile(here, tile_sums, floats, at, count, start, !k0, 0, next, count * NM_LANES * nm_value_bytes(j) / LINE);
                if (k1 == k) unpack(j, group, row, token0, tokens, nv, tile_sums);
            }
        }
    }
    return wrong ? NM_BAD_CODE : NM_OK;
}
