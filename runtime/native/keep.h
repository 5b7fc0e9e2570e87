/* Numbers of BITS bits under a mask. */

static void JOIN(keep_, BITS)(const nm_sweep *s, int64_t first, int64_t last) {
    typedef JOIN(JOIN(uint, BITS), _t) word;
    const word *restrict weight = s->weight;
    const uint8_t *restrict mask = s->mask;
    word *restrict out = s->out;
    for (int64_t i = first; i < last; i++) out[i] = weight[i] & (word)-(word)(mask[i] != 0);
}
