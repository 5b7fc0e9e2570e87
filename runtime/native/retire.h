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

/* own[j]: score j of every group; a group's are `apart` numbers apart. */
static inline __attribute__((always_inline)) void NAMED(side_by_side)(
    const REAL *const groups[SIDE], sums *own, int64_t m, int64_t apart) {
#if BYTES >= 32 && defined(__AVX2__)
    if (sizeof(REAL) == 4 && apart == 1 && m % 4 == 0) { /* four by four, turned in registers */
        for (int64_t j = 0; j < m; j += 4)
            for (int half = 0; half < SIDE / 4; half++) {
                __m256d row[4], pair[4], turned[4];
                for (int k = 0; k < 4; k++) row[k] = _mm256_cvtps_pd(_mm_loadu_ps((const float *)groups[4 * half + k] + j));
                pair[0] = _mm256_unpacklo_pd(row[0], row[1]), pair[1] = _mm256_unpackhi_pd(row[0], row[1]);
                pair[2] = _mm256_unpacklo_pd(row[2], row[3]), pair[3] = _mm256_unpackhi_pd(row[2], row[3]);
                turned[0] = _mm256_permute2f128_pd(pair[0], pair[2], 0x20), turned[1] = _mm256_permute2f128_pd(pair[1], pair[3], 0x20);
                turned[2] = _mm256_permute2f128_pd(pair[0], pair[2], 0x31), turned[3] = _mm256_permute2f128_pd(pair[1], pair[3], 0x31);
                for (int i = 0; i < 4; i++) memcpy((char *)&own[j + i] + 32 * half, &turned[i], 32);
            }
        return;
    }
#endif
    for (int64_t j = 0; j < m; j++)
        for (int k = 0; k < SIDE; k++) ((double *)own)[j * SIDE + k] = (double)groups[k][j * apart];
}

static inline __attribute__((always_inline)) void NAMED(retire_of)(
    const nm_sweep *s, int64_t first, int64_t last, int64_t n, int64_t m, int64_t inner, int64_t bytes) {
    const REAL *scores = s->weight;
    const int64_t lanes = (last - first) * s->inner, all = s->combinations, keep = s->keep;
    sums own[NM_WIDEST], values[MOST_COMBINATIONS];
    beginnings begun;
    begin_all(s, &begun);
    for (int64_t lane = 0; lane < lanes; lane += SIDE) {
        const int64_t side = least(SIDE, lanes - lane);
        const uint8_t *live[SIDE];
        uint8_t *kept[SIDE];
        const REAL *groups[SIDE];
        for (int64_t k = 0; k < SIDE; k++) { /* the last group stands in for those beyond it */
            const int64_t at = least(lane + k, lanes - 1), unit = first + (inner == 1 ? at : at / inner), t = inner == 1 ? 0 : at % inner;
            groups[k] = scores + unit * m * inner + t;
            live[k] = inner == 1 ? s->live + unit * bytes : live_set(s, unit, t);
            kept[k] = (uint8_t *)s->out + (live[k] - s->live);
            memcpy(kept[k], live[k], (size_t)bytes);
        }
        NAMED(side_by_side)(groups, own, m, inner);
        whole left = {0};
        int64_t over = all;
        if (all > FEW) {
            over = 0;
            for (int64_t k = 0; k < SIDE; k++) {
                left[k] = live_count(live[k], bytes);
                over = left[k] - keep > over ? left[k] - keep : over;
            }
            if (!over) continue;
        }
        sums steps[KEYED];
        if (over == 1 && n == 4 && m == KEYED && whole_scores(own, steps)) { /* as in most steps of a training */
            drop(kept, lowest_key(steps, live), left, keep, side);
            continue;
        }
        whole tame = {0};
        tame -= 1;
        for (int64_t j = 0; j < m; j++) tame &= (own[j] > -TAME) & (own[j] < TAME);
        const int is_tame = in_all(tame);
        if (over == 1 && is_tame) {
            drop(kept, lowest_live(own, live, s, &begun, values, n), left, keep, side);
            continue;
        }
        left = is_tame ? NAMED(sum_up)(s, live, own, (double)__builtin_inff(), values, n, 1)
                             : NAMED(sum_up)(s, live, own, (double)__builtin_inff(), values, n, 0);
        int64_t most = 0;
        for (int64_t k = 0; k < side; k++) most = left[k] > most ? left[k] : most;
        if (most - keep > keep) { /* fewer stay than go */
            for (int64_t c = 0; c < all; c++) values[c] = either(values[c] > 3.5e38, (sums){0} - (double)__builtin_inff(), values[c]);
            for (int64_t k = 0; k < side; k++)
                if (left[k] > keep) memset(kept[k], 0, (size_t)bytes);
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
    if (s->n == 4 && s->m == 8 && s->inner == 1) NAMED(retire_of)(s, first, last, 4, 8, 1, 9);
    else if (s->n == 4 && s->m == 8) NAMED(retire_of)(s, first, last, 4, 8, s->inner, 9);
    else if (s->n == 1) NAMED(retire_of)(s, first, last, 1, s->m, s->inner, s->bytes);
    else if (s->n == 2) NAMED(retire_of)(s, first, last, 2, s->m, s->inner, s->bytes);
    else NAMED(retire_of)(s, first, last, s->n, s->m, s->inner, s->bytes);
}
