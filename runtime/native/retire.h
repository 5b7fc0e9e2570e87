/* The best combinations of SIDE groups side by side, for scores of type REAL: sums in double, in the order of the positions. */

/* Values of the combinations, `gone` where one is not live; returns how many are. NaN is lowest, no sum is beyond a float;
 * tame: neither can be. */
static inline __attribute__((always_inline)) whole NAMED(sum_up)(
    const nm_sweep *s, const uint8_t *const live[SIDE], const sums *own, double gone, sums *values, int64_t n, int tame) {
    const sums zero = {0}, high = zero + 3.4e38, low = zero - 3.4e38, out = zero + gone;
    const uint8_t *members = s->table;
    whole count = {0};
    for (int64_t c = 0; c < s->combinations;) {
        whole byte;
        for (int k = 0; k < SIDE; k++) byte[k] = live[k][c / 8];
        for (const int64_t stop = least(c + 8, s->combinations); c < stop; c++, members += n, byte >>= 1) {
            sums value = own[members[0]];
            for (int64_t i = 1; i < n; i++) value += own[members[i]];
            if (!tame) {
                value = either(value >= low, value, low);
                value = either(value > high, high, value);
            }
            const whole is_live = (byte & 1) != 0;
            values[c] = either(is_live, value, out);
            count -= is_live;
        }
    }
    return count;
}

static inline __attribute__((always_inline)) void NAMED(retire_of)(const nm_sweep *s, int64_t first, int64_t last, int64_t n) {
    const REAL *scores = s->weight;
    const int64_t lanes = (last - first) * s->inner, all = s->combinations, keep = s->keep, m = s->m, inner = s->inner;
    sums own[NM_WIDEST], values[MOST_COMBINATIONS];
    beginnings begun;
    begin_all(s, &begun);
    for (int64_t lane = 0; lane < lanes; lane += SIDE) {
        const int64_t side = least(SIDE, lanes - lane);
        const uint8_t *live[SIDE];
        uint8_t *kept[SIDE];
        for (int64_t k = 0; k < SIDE; k++) { /* the last group stands in for those beyond it */
            const int64_t at = least(lane + k, lanes - 1), unit = first + (inner == 1 ? at : at / inner), t = inner == 1 ? 0 : at % inner;
            const REAL *group = scores + unit * m * inner + t;
            for (int64_t j = 0; j < m; j++) ((double *)own)[j * SIDE + k] = (double)group[j * inner];
            live[k] = live_set(s, unit, t);
            kept[k] = (uint8_t *)s->out + (live[k] - s->live);
            memcpy(kept[k], live[k], (size_t)s->bytes);
        }
        whole tame = {0};
        tame -= 1;
        for (int64_t j = 0; j < m; j++) tame &= (own[j] > -1e37) & (own[j] < 1e37);
        int is_tame = 1;
        for (int k = 0; k < SIDE; k++) is_tame &= tame[k] != 0;
        whole left = {0};
        if (all > FEW) {
            int64_t over = 0;
            for (int64_t k = 0; k < SIDE; k++) {
                left[k] = live_count(live[k], s->bytes);
                over = left[k] - keep > over ? left[k] - keep : over;
            }
            if (!over) continue;
            if (over == 1 && is_tame) { /* as in most steps of a training */
                const whole which = lowest_live(own, live, s, &begun, values, n);
                for (int64_t k = 0; k < side; k++)
                    if (left[k] > keep) kept[k][which[k] >> 3] &= (uint8_t)~(1 << (which[k] & 7));
                continue;
            }
        }
        left = is_tame ? NAMED(sum_up)(s, live, own, (double)__builtin_inff(), values, n, 1)
                             : NAMED(sum_up)(s, live, own, (double)__builtin_inff(), values, n, 0);
        int64_t most = 0;
        for (int64_t k = 0; k < side; k++) most = left[k] > most ? left[k] : most;
        if (most - keep > keep) { /* fewer stay than go */
            for (int64_t c = 0; c < all; c++) values[c] = either(values[c] > 3.5e38, (sums){0} - (double)__builtin_inff(), values[c]);
            for (int64_t k = 0; k < side; k++)
                if (left[k] > keep) memset(kept[k], 0, (size_t)s->bytes);
            for (int64_t round = 0; round < keep; round++) {
                const whole which = highest(values, all);
                for (int64_t k = 0; k < side; k++) {
                    if (left[k] <= keep) continue;
                    kept[k][which[k] >> 3] |= (uint8_t)(1 << (which[k] & 7));
                    ((double *)values)[which[k] * SIDE + k] = -(double)__builtin_inff();
                }
            }
            continue;
        }
        for (; most > keep; most--) {
            const whole which = lowest(values, all);
            for (int64_t k = 0; k < side; k++) {
                if (left[k] <= keep) continue;
                kept[k][which[k] >> 3] &= (uint8_t)~(1 << (which[k] & 7));
                ((double *)values)[which[k] * SIDE + k] = (double)__builtin_inff();
                left[k]--;
            }
        }
    }
}

static void NAMED(retire)(const nm_sweep *s, int64_t first, int64_t last) {
    switch (s->n) {
    case 1: NAMED(retire_of)(s, first, last, 1); break;
    case 2: NAMED(retire_of)(s, first, last, 2); break;
    case 4: NAMED(retire_of)(s, first, last, 4); break;
    default: NAMED(retire_of)(s, first, last, s->n);
    }
}
