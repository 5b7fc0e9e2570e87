/* What a run's live sets say of every number: whether its position is covered, and whether its group has a choice. */

/* For each number of a run 1 if a live combination has its position, else 0; marks: ROOM bytes. */
static void mark(const nm_sweep *s, const run *r, uint8_t *marks) {
    if (has_planes(s)) {
        mark_planes(s, r, marks);
        return;
    }
    if (r->rows == 1) {
        cover_to(s, r->unit, r->unit + r->units, marks);
        return;
    }
    uint64_t full[NM_WIDEST / 8] = {0}, found[NM_WIDEST / 8] = {0};
    memset(full, 1, (size_t)s->m);
    for (int64_t k = 0; k < r->count; k++) {
        unite(live_set(s, r->unit, r->t + k), s->bytes, s->table, full, found, s->m, NM_WIDEST / 8);
        for (int64_t j = 0; j < s->m; j++) marks[j * r->count + k] = ((const uint8_t *)found)[j];
    }
}

static void cover(const nm_sweep *s, int64_t first, int64_t last) {
    uint8_t *out = s->out, marks[ROOM];
    if (!has_planes(s)) {
        cover_to(s, first, last, out + first * s->m * s->inner);
        return;
    }
    for (run r = {.unit = first}; next_run(s, &r, last);) {
        mark(s, &r, marks);
        for (int64_t j = 0; j < r.rows; j++) memcpy(out + r.at + j * r.apart, marks + j * r.count, (size_t)r.count);
    }
}

/* For each live set of a run 1 if it has a choice, else 0, in the order of a row. Returns whether all have. */
static int choose(const nm_sweep *s, const run *r, uint8_t *each) {
    if (has_planes(s)) return choose_planes(s, r, each);
    const int64_t units = r->rows > 1 ? 1 : r->units, side = r->rows > 1 ? r->count : s->inner;
    int all = 1;
    for (int64_t u = 0; u < units; u++)
        for (int64_t k = 0; k < side; k++) all &= *each++ = (uint8_t)undecided(live_set(s, r->unit + u, r->t + k), s->bytes);
    return all;
}

/* For each number of a run 1 if its group has a choice, else 0; or nothing where all have: then it returns 1. */
static int choices(const nm_sweep *s, const run *r, uint8_t *choice) {
    uint8_t each[MARKS];
    if (s->inner == 1 && all_undecided(s->live + r->unit * s->bytes, r->units, s->bytes)) return 1;
    if (choose(s, r, each)) return 1;
    const int64_t m = s->m, units = r->rows > 1 ? 1 : r->units, side = r->rows > 1 ? r->count : s->inner;
    for (int64_t u = 0; u < units; u++, choice += m * side) {
        if (side == 1 && m == 4) memset(choice, each[u], 4);
        else if (side == 1) memset(choice, each[u], (size_t)m);
        else for (int64_t j = 0; j < m; j++) memcpy(choice + j * side, each + u * side, (size_t)side);
    }
    return 0;
}
