/* Gradients of masked weights, for numbers of type REAL: each a single pass over memory. */

#define FACTORS 2048 /* on the stack; at least NM_WIDEST */

static inline __attribute__((always_inline)) void NAMED(both)(
    const REAL *restrict grad, const REAL *restrict weight, const uint8_t *restrict mask, const REAL *restrict factor,
    REAL *restrict out, REAL *restrict second, int64_t count, int all) {
    for (int64_t i = 0; i < count; i++) {
        const REAL given = grad[i], through = mask[i] ? given : (REAL)0, moved = weight[i] * through;
        out[i] = through;
        second[i] = all ? moved : moved * factor[i];
    }
}

/* Whether all groups have a choice. Groups unit, unit + 1, .. or lanes t, t + 1, .. of one. */
static int NAMED(all_undecided)(const nm_sweep *s, int64_t unit, int64_t t, int64_t count) {
    int none = 0;
    if (s->inner == 1 && s->bytes == 1) {
        const uint8_t *live = s->live + unit;
        uint8_t decided = 0;
        for (int64_t k = 0; k < count; k++) decided |= (live[k] & (live[k] - 1)) == 0;
        return !decided;
    }
    for (int64_t k = 0; k < count && !none; k++)
        none = !undecided(s->inner == 1 ? s->live + (unit + k) * s->bytes : live_set(s, unit, t + k), s->bytes);
    return !none;
}

/* For each, `repeat` times: 1 if it has a choice, else 0. */
static inline __attribute__((always_inline)) void NAMED(factors)(
    const nm_sweep *s, int64_t unit, int64_t t, int64_t count, int64_t repeat, REAL *factor) {
    for (int64_t k = 0; k < count; k++) {
        const uint8_t *live = s->inner == 1 ? s->live + (unit + k) * s->bytes : live_set(s, unit, t + k);
        const REAL chosen = (REAL)undecided(live, s->bytes);
        for (int64_t j = 0; j < repeat; j++) factor[k * repeat + j] = chosen;
    }
}

static void NAMED(gradients)(const nm_sweep *s, int64_t first, int64_t last) {
    const REAL *grad = s->grad, *weight = s->weight;
    REAL *out = s->out, *second = s->second, factor[FACTORS];
    if (!s->live) {
        NAMED(both)(grad + first, weight + first, s->mask + first, factor, out + first, second + first, last - first, 1);
        return;
    }
    const int side_by_side = s->inner == 1;
    const int64_t m = s->m, step = side_by_side ? FACTORS / m : 1, rows = side_by_side ? 1 : m;
    for (int64_t unit = first; unit < last; unit += step) {
        const int64_t units = least(step, last - unit), width = side_by_side ? units * m : s->inner;
        for (int64_t t = 0; t < width; t += FACTORS) {
            const int64_t count = least(FACTORS, width - t);
            const int all = NAMED(all_undecided)(s, unit, t, side_by_side ? units : count);
            if (!all) {
                if (!side_by_side) NAMED(factors)(s, unit, t, count, 1, factor);
                else if (m == 4) NAMED(factors)(s, unit, 0, units, 4, factor);
                else if (m == 8) NAMED(factors)(s, unit, 0, units, 8, factor);
                else NAMED(factors)(s, unit, 0, units, m, factor);
            }
            for (int64_t j = 0; j < rows; j++) {
                const int64_t at = (unit * m + j) * s->inner + t;
                if (all) NAMED(both)(grad + at, weight + at, s->mask + at, factor, out + at, second + at, count, 1);
                else NAMED(both)(grad + at, weight + at, s->mask + at, factor, out + at, second + at, count, 0);
            }
        }
    }
}

static void NAMED(decay)(const nm_sweep *s, int64_t first, int64_t last) {
    const REAL *restrict grad = s->grad, *restrict weight = s->weight, *restrict masked = s->masked;
    REAL *restrict out = s->out;
    const REAL decay = (REAL)s->decay;
    for (int64_t i = first; i < last; i++) out[i] = (weight[i] - masked[i]) * decay + grad[i];
}

#undef FACTORS
