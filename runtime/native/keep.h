/* Numbers of BITS bits under a mask, or under live sets. */

static inline __attribute__((always_inline)) void JOIN(select_, BITS)(
    const JOIN(JOIN(uint, BITS), _t) *restrict weight, const uint8_t *restrict mask, JOIN(JOIN(uint, BITS), _t) *restrict out, int64_t count) {
    typedef JOIN(JOIN(uint, BITS), _t) word;
    for (int64_t i = 0; i < count; i++) out[i] = weight[i] & (word)-(word)(mask[i] != 0);
}

static void JOIN(keep_, BITS)(const nm_sweep *s, int64_t first, int64_t last) {
    typedef JOIN(JOIN(uint, BITS), _t) word;
    JOIN(select_, BITS)((const word *)s->weight + first, s->mask + first, (word *)s->out + first, last - first);
}

static void JOIN(covered_, BITS)(const nm_sweep *s, int64_t first, int64_t last) {
    typedef JOIN(JOIN(uint, BITS), _t) word;
    uint8_t marks[ROOM] __attribute__((aligned(64)));
    if (BITS == 32) first = covered_beside(s, first, last);
    for (run r = {.unit = first}; next_run(s, &r, last);) {
        mark(s, &r, marks);
        for (int64_t j = 0; j < r.rows; j++) {
            const int64_t at = r.at + j * r.apart;
            JOIN(select_, BITS)((const word *)s->weight + at, marks + j * r.count, (word *)s->out + at, r.count);
        }
    }
}
