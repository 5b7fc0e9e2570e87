/* Live sets whose groups lie across: their bytes are laid out anew, in the order in which numbers lie, and looked at 16 sets at a time. */

typedef uint8_t sixteen __attribute__((vector_size(16)));
typedef uint8_t sixteen_any __attribute__((vector_size(16), aligned(1), may_alias));

#define PLANES 9 /* the most bytes of a live set: 4:8 has 9 */

/* Of a run. of + b * apart: byte b of every live set, row by row of `side` sets. There is room for any M whose sets have at most 9
 * bytes: for M below 8 they have at most 5. */
typedef struct {
    int64_t apart, count, side;
    uint8_t of[PLANES * (MARKS / 8 + 16)];
} planes;

static inline int has_planes(const nm_sweep *s) { return s->inner > 1 && s->bytes <= PLANES; }

static inline __attribute__((always_inline)) void lay_out(const nm_sweep *s, const run *r, int64_t bytes, planes *p) {
    const int64_t units = r->rows > 1 ? 1 : r->units, next = s->groups * bytes;
    p->apart = MARKS / s->m + 16, p->side = r->rows > 1 ? r->count : s->inner, p->count = units * p->side;
    uint8_t *to = p->of;
    for (int64_t u = 0; u < units; u++, to += p->side) {
        const uint8_t *live = live_set(s, r->unit + u, r->t);
        for (int64_t k = 0; k < p->side; k++)
            for (int64_t b = 0; b < bytes; b++) to[b * p->apart + k] = live[k * next + b];
    }
}

static inline __attribute__((always_inline)) void mark_planes_of(const nm_sweep *s, const run *r, int64_t bytes, uint8_t *marks) {
    uint8_t has[PLANES][NM_WIDEST];
    planes p;
    lay_out(s, r, bytes, &p);
    know_members(s, has);
    for (int64_t k = 0; k < p.count; k += p.side)
        for (int64_t j = 0; j < s->m; j++, marks += p.side)
            for (int64_t i = 0; i < p.side; i += 16) { /* up to 15 too far, where the next row is yet to come */
                const uint8_t *of = p.of + k + i;
                sixteen hit = *(const sixteen_any *)of & has[0][j];
                for (int64_t b = 1; b < bytes; b++) hit |= *(const sixteen_any *)(of + b * p.apart) & has[b][j];
                *(sixteen_any *)(marks + i) = (sixteen)(hit != 0) & 1;
            }
}

static inline __attribute__((always_inline)) int choose_planes_of(const nm_sweep *s, const run *r, int64_t bytes, uint8_t *restrict each) {
    planes p;
    lay_out(s, r, bytes, &p);
    uint8_t none = 0;
    for (int64_t k = 0; k < p.count; k++) {
        uint8_t seen = p.of[k], more = seen & (seen - 1);
        for (int64_t b = 1; b < bytes; b++) {
            const uint8_t byte = p.of[b * p.apart + k];
            more |= (byte & (byte - 1)) | (seen != 0 ? byte : 0);
            seen |= byte;
        }
        each[k] = more != 0;
        none |= more == 0;
    }
    return !none;
}

/* As `mark` and `choose` in marks.h. */
static void mark_planes(const nm_sweep *s, const run *r, uint8_t *marks) {
    if (s->bytes == 1) mark_planes_of(s, r, 1, marks);
    else if (s->bytes == PLANES) mark_planes_of(s, r, PLANES, marks);
    else mark_planes_of(s, r, s->bytes, marks);
}

static int choose_planes(const nm_sweep *s, const run *r, uint8_t *each) {
    return s->bytes == 1 ? choose_planes_of(s, r, 1, each) : choose_planes_of(s, r, s->bytes, each);
}
