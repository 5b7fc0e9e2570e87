/* Of values of many combinations, for SIDE groups side by side: where the lowest and the highest stand. */

#define SIDE (BYTES / 8)
#define MOST_COMBINATIONS 1824

typedef double sums __attribute__((vector_size(BYTES)));
typedef int64_t whole __attribute__((vector_size(BYTES)));

static inline __attribute__((always_inline)) sums either(whole where, sums a, sums b) {
    return (sums)((where & (whole)a) | (~where & (whole)b));
}
static inline __attribute__((always_inline)) sums lower(sums a, sums b) { return either(a < b, a, b); }
static inline __attribute__((always_inline)) sums higher(sums a, sums b) { return either(a > b, a, b); }

/* The last among equals. */
static whole lowest(const sums *values, int64_t count) {
    sums best[4] = {values[0], values[0], values[0], values[0]}; /* four chains: a comparison takes a while */
    int64_t c = 1;
    for (; c + 4 <= count; c += 4)
        for (int i = 0; i < 4; i++) best[i] = lower(values[c + i], best[i]);
    for (; c < count; c++) best[0] = lower(values[c], best[0]);
    const sums found = lower(lower(best[0], best[1]), lower(best[2], best[3]));
    whole which = {0};
    for (c = 0; c < count; c++) {
        const whole here = values[c] == found;
        which = (here & c) | (~here & which);
    }
    return which;
}

/* The first among equals. */
static whole highest(const sums *values, int64_t count) {
    sums best[4] = {values[0], values[0], values[0], values[0]};
    int64_t c = 1;
    for (; c + 4 <= count; c += 4)
        for (int i = 0; i < 4; i++) best[i] = higher(values[c + i], best[i]);
    for (; c < count; c++) best[0] = higher(values[c], best[0]);
    const sums found = higher(higher(best[0], best[1]), higher(best[2], best[3]));
    whole which = {0};
    for (c = count; c-- > 0;) {
        const whole here = values[c] == found;
        which = (here & c) | (~here & which);
    }
    return which;
}
