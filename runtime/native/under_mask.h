/* Gradients of masked weights, for numbers of type REAL: each a single pass over memory. */

static inline __attribute__((always_inline)) void NAMED(both)(
    const REAL *restrict grad, const REAL *restrict weight, const uint8_t *restrict marks, const uint8_t *restrict choice,
    REAL *restrict out, REAL *restrict second, int64_t count, int all) {
    for (int64_t i = 0; i < count; i++) {
        const REAL given = grad[i], through = marks[i] ? given : (REAL)0, moved = weight[i] * through;
        out[i] = through;
        second[i] = all ? moved : moved * (REAL)choice[i];
    }
}

static void NAMED(gradients)(const nm_sweep *s, int64_t first, int64_t last) {
    const REAL *grad = s->grad, *weight = s->weight;
    REAL *out = s->out, *second = s->second;
    uint8_t marks[ROOM] __attribute__((aligned(64))), choice[MARKS];
    if (sizeof(REAL) == 4) first = gradients_beside(s, first, last);
    for (run r = {.unit = first}; next_run(s, &r, last);) {
        const int all = choices(s, &r, choice);
        mark(s, &r, marks);
        for (int64_t j = 0; j < r.rows; j++) {
            const int64_t at = r.at + j * r.apart, own = j * r.count;
            if (all) NAMED(both)(grad + at, weight + at, marks + own, choice, out + at, second + at, r.count, 1);
            else NAMED(both)(grad + at, weight + at, marks + own, choice + own, out + at, second + at, r.count, 0);
        }
    }
}

static void NAMED(decay)(const nm_sweep *s, int64_t first, int64_t last) {
    const REAL *restrict grad = s->grad, *restrict weight = s->weight, *restrict masked = s->masked;
    REAL *restrict out = s->out;
    const REAL decay = (REAL)s->decay;
    for (int64_t i = first; i < last; i++) out[i] = (weight[i] - masked[i]) * decay + grad[i];
}
