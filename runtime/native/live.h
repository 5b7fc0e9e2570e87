/* Packed live sets, one bit a combination, `bytes` bytes a group: what they cover, and whether they have a choice. */

/* Whether a group has more than one live combination. */
static inline int undecided(const uint8_t *live, int64_t bytes) {
    if (bytes == 1) return (live[0] & (live[0] - 1)) != 0;
    if (bytes >= 8 && bytes <= 16) { /* two words that share no byte */
        uint64_t low, high;
        memcpy(&low, live, 8);
        memcpy(&high, live + bytes - 8, 8);
        high = bytes == 8 ? 0 : high >> (8 * (16 - bytes));
        return ((low & (low - 1)) | (high & (high - 1))) != 0 || (low != 0 && high != 0);
    }
    int seen = 0;
    for (int64_t b = 0; b < bytes; b++) {
        if ((live[b] & (live[b] - 1)) | (seen & (live[b] != 0))) return 1;
        seen |= live[b] != 0;
    }
    return 0;
}

/* Of groups side by side: 0 where one has none, and rarely where all have. */
static inline int all_undecided(const uint8_t *live, int64_t groups, int64_t bytes) {
    uint8_t none = 0;
    if (bytes == 1) /* a vector at a time */
        for (int64_t k = 0; k < groups; k++) none |= (live[k] & (live[k] - 1)) == 0;
    else if (bytes >= 8)
        for (int64_t k = 0; k < groups; k++) { /* two in the first eight bytes, usually */
            uint64_t word;
            memcpy(&word, live + k * bytes, 8);
            none |= (word & (word - 1)) == 0;
        }
    else
        for (int64_t k = 0; k < groups; k++) none |= !undecided(live + k * bytes, bytes);
    return !none;
}

/* members[b][j]: of byte b of a live set the bits of the combinations that have position j. */
static void know_members(const nm_sweep *s, uint8_t members[][NM_WIDEST]) {
    for (int64_t b = 0; b < s->bytes; b++)
        for (int64_t j = 0; j < s->m; j++) {
            unsigned bits = 0;
            for (int c = 0; c < 8; c++) bits |= (unsigned)(s->table[(b * 256 + (1 << c)) * s->m + j] != 0) << c;
            members[b][j] = (uint8_t)bits;
        }
}

/* M = 4, one byte a live set, groups side by side: each byte is repeated and tested against the combinations of 4 positions. */
static void cover_four(const nm_sweep *s, int64_t first, int64_t last, uint8_t *to) {
    uint32_t has = 0; /* byte j: the combinations that have position j */
    for (int j = 0; j < 4; j++)
        for (int c = 0; c < 8; c++) has |= (uint32_t)(s->table[(1 << c) * 4 + j] != 0) << (8 * j + c);
    const uint8_t *restrict live = s->live + first;
    uint32_t *restrict out = (uint32_t *)to;
    for (int64_t k = 0; k < last - first; k++) {
        const uint32_t hit = live[k] * 0x01010101u & has;
        out[k] = (((hit & 0x7f7f7f7fu) + 0x7f7f7f7fu) | hit) >> 7 & 0x01010101u; /* 1 in each byte that is not zero */
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

static inline __attribute__((always_inline)) void cover_all(
    const nm_sweep *s, int64_t first, int64_t last, uint8_t *out, int64_t m, int parts) {
    const int64_t bytes = s->bytes, inner = s->inner;
    const uint8_t *table = s->table, *live = s->live + first * bytes;
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
static void cover_eight(const nm_sweep *s, int64_t first, int64_t last, uint8_t *restrict out) {
    const int64_t bytes = s->bytes;
    const uint8_t *restrict table = s->table, *restrict live = s->live + first * bytes;
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

/* Bytes 0 or 1 of units first..last, as their numbers lie. */
static void cover_to(const nm_sweep *s, int64_t first, int64_t last, uint8_t *to) {
    if (s->m == 4 && s->bytes == 1 && s->inner == 1 && (uintptr_t)to % 4 == 0) cover_four(s, first, last, to);
    else if (s->m == 8 && s->inner == 1) cover_eight(s, first, last, to);
    else if (s->m == 16) cover_all(s, first, last, to, 16, 2);
    else cover_all(s, first, last, to, s->m, NM_WIDEST / 8);
}

/* -- runs: as many numbers as have their marks on the stack -------------------------------------------------------------------- */

#define MARKS 4096 /* at least NM_WIDEST */
#define ROOM (MARKS + 16) /* marks are written 16 at a time */

/* `rows` times `count` numbers that lie side by side, rows `apart`: whole units (one row), or lanes t.. of one that is longer. */
typedef struct {
    int64_t unit, units, t, at, count, rows, apart;
} run;

/* The run behind `r`, of units before `last`; begins with {.unit = first}. Returns 0 at the end. */
static inline int next_run(const nm_sweep *s, run *r, int64_t last) {
    const int64_t group = s->m * s->inner;
    if (group <= MARKS) {
        r->unit += r->units;
        r->units = least(MARKS / group, last - r->unit);
        r->at = r->unit * group, r->count = r->units * group, r->rows = 1;
        return r->units > 0;
    }
    r->t += r->count;
    if (r->t == s->inner) r->t = 0, r->unit++;
    r->at = r->unit * group + r->t, r->count = least(MARKS / s->m, s->inner - r->t), r->rows = s->m, r->apart = s->inner;
    return r->unit < last;
}
