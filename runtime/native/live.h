/* Packed live sets: one bit a combination, `bytes` bytes a group. */

/* Whether a group has more than one live combination: usually the first byte says so. */
static inline int undecided(const uint8_t *live, int64_t bytes) {
    if (bytes == 1) return (live[0] & (live[0] - 1)) != 0;
    if (live[0] & (live[0] - 1)) return 1;
    int seen = live[0] != 0;
    for (int64_t b = 1; b < bytes; b++) {
        if ((live[b] & (live[b] - 1)) | (seen & (live[b] != 0))) return 1;
        seen |= live[b] != 0;
    }
    return 0;
}

/* M = 4, one byte a live set, groups side by side: each byte is repeated and tested against the combinations of 4 positions. */
static void cover_four(const nm_sweep *s, int64_t first, int64_t last) {
    uint32_t has = 0; /* byte j: the combinations that have position j */
    for (int j = 0; j < 4; j++)
        for (int c = 0; c < 8; c++) has |= (uint32_t)(s->table[(1 << c) * 4 + j] != 0) << (8 * j + c);
    const uint8_t *restrict live = s->live;
    uint32_t *restrict out = s->out;
    for (int64_t unit = first; unit < last; unit++) {
        const uint32_t hit = live[unit] * 0x01010101u & has;
        out[unit] = (((hit & 0x7f7f7f7fu) + 0x7f7f7f7fu) | hit) >> 7 & 0x01010101u; /* 1 in each byte that is not zero */
    }
}

/* The union of one live set: M bytes of 8 `parts`, those beyond M zero. full: 1 for all positions. */
static inline __attribute__((always_inline)) void unite(
    const uint8_t *live, int64_t bytes, const uint8_t *table, const uint64_t *full, uint64_t *found, int64_t m, int parts) {
    uint64_t other[NM_WIDEST / 8] = {0};
    memcpy(found, table + live[0] * m, (size_t)m);
    for (int64_t b = 1; b < bytes;) { /* usually the first byte has them all; later a look at each costs more than it saves */
        uint64_t missing = 0;
        for (int part = 0; part < parts; part++) missing |= found[part] ^ full[part];
        if (!missing) return;
        for (const int64_t stop = least(b + 8, bytes); b < stop; b++) {
            memcpy(other, table + (b * 256 + live[b]) * m, (size_t)m);
            for (int part = 0; part < parts; part++) found[part] |= other[part];
        }
    }
}

static inline __attribute__((always_inline)) void cover_all(const nm_sweep *s, int64_t first, int64_t last, int64_t m, int parts) {
    const int64_t bytes = s->bytes, inner = s->inner;
    const uint8_t *table = s->table, *live = s->live + first * bytes;
    uint8_t *out = (uint8_t *)s->out + first * m * inner;
    uint64_t full[NM_WIDEST / 8] = {0}, found[NM_WIDEST / 8] = {0};
    memset(full, 1, (size_t)m);
    if (inner == 1) {
        for (int64_t unit = first; unit < last; unit++, live += bytes, out += m) {
            unite(live, bytes, table, full, found, m, parts);
            memcpy(out, found, (size_t)m);
        }
        return;
    }
    for (int64_t unit = first; unit < last; unit++, out += m * inner)
        for (int64_t t = 0; t < inner; t++) {
            unite(live_set(s, unit, t), bytes, table, full, found, m, parts);
            for (int64_t j = 0; j < m; j++) out[j * inner + t] = ((const uint8_t *)found)[j];
        }
}

/* M = 8, groups side by side: a union is one word. */
static void cover_eight(const nm_sweep *s, int64_t first, int64_t last) {
    const int64_t bytes = s->bytes;
    const uint8_t *restrict table = s->table, *restrict live = s->live + first * bytes;
    uint8_t *restrict out = (uint8_t *)s->out + first * 8;
    for (int64_t unit = first; unit < last; unit++, live += bytes, out += 8) {
        uint64_t found, other;
        memcpy(&found, table + live[0] * 8, 8);
        if (found != 0x0101010101010101u)
            for (int64_t b = 1; b < bytes; b++) {
                memcpy(&other, table + (b * 256 + live[b]) * 8, 8);
                found |= other;
            }
        memcpy(out, &found, 8);
    }
}

static void cover(const nm_sweep *s, int64_t first, int64_t last) {
    if (s->m == 4 && s->bytes == 1 && s->inner == 1 && (uintptr_t)s->out % 4 == 0) cover_four(s, first, last);
    else if (s->m == 8 && s->inner == 1) cover_eight(s, first, last);
    else if (s->m == 16) cover_all(s, first, last, 16, 2);
    else cover_all(s, first, last, s->m, NM_WIDEST / 8);
}
