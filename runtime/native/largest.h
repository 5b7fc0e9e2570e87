/* The n largest magnitudes of every group of M, for numbers of BITS bits: as whole numbers without the sign bit magnitudes order
 * as they should, NaN above infinity. The lower index wins among equals. */

#define WITH(name) JOIN(JOIN(name, _), BITS)
#define WORD JOIN(JOIN(uint, BITS), _t)
#define SIGNED JOIN(JOIN(int, BITS), _t)
#define KEYS WITH(lanes)
#define LANES (BYTES / (BITS / 8))
#define COLUMNS 128
#define LARGE (1 << 22) /* numbers */
#define POSITIVE ((SIGNED)(((WORD)-1) >> 1))
#define INLINE static inline __attribute__((always_inline))

typedef KEYS WITH(keys_any) __attribute__((aligned(1), may_alias));
typedef uint8_t WITH(bytes) __attribute__((vector_size(LANES)));
typedef uint8_t WITH(bytes_any) __attribute__((vector_size(LANES), aligned(1), may_alias));

INLINE KEYS WITH(either)(KEYS where, KEYS a, KEYS b) { return (where & a) | (~where & b); }
INLINE KEYS WITH(load)(const WORD *from) { return *(const WITH(keys_any) *)from; }

/* The mask as bytes, or the numbers under it, for LANES numbers that lie side by side. keep: -1 or 0. */
INLINE void WITH(put)(const nm_sweep *s, KEYS keep, int64_t at) {
    if (s->kind == NM_MASK) *(WITH(bytes_any) *)((uint8_t *)s->out + at) = __builtin_convertvector(keep & 1, WITH(bytes));
    else *(WITH(keys_any) *)((WORD *)s->out + at) = WITH(load)((const WORD *)s->weight + at) & keep;
}

/* Whether a mask is written past the caches: a large one, if every store is aligned. */
INLINE int WITH(streams)(const nm_sweep *s, int64_t first) {
    return s->kind == NM_MASK && s->groups * s->m >= LARGE && (uintptr_t)s->out % LANES == 0 && first % LANES == 0;
}

INLINE void WITH(stream)(const nm_sweep *s, KEYS keep, int64_t at) {
    const WITH(bytes) mask = __builtin_convertvector(keep & 1, WITH(bytes));
    uint8_t *out = (uint8_t *)s->out + at;
#if BYTES == 64 && BITS == 16
    _mm256_stream_si256((__m256i *)out, (__m256i)mask);
#elif (BYTES == 64 && BITS == 32) || (BYTES == 32 && BITS == 16)
    _mm_stream_si128((__m128i *)out, (__m128i)mask);
#else
    *(WITH(bytes_any) *)out = mask;
#endif
}

/* -- groups in a vector: M lanes each, M a power of two ---------------------------------------------------------------------- */

/* How many of its group beat each lane: those r = 1, 2, .. M - 1 away, reached by one exchange after another (a Gray code). */
INLINE KEYS WITH(beaten)(KEYS own, KEYS lane, int m) {
    KEYS rank = {0}, other = own;
#pragma GCC unroll 32
    for (int step = 1; step < m; step++) {
        const int away = step & -step, r = step ^ (step >> 1), top = 1 << (31 - __builtin_clz((unsigned)r));
        other = (KEYS)exchange((bare_64)other, away * (BITS / 8));
        rank -= other > own + ((lane & (SIGNED)top) != 0); /* 1 less where the other lies before and wins if equal */
    }
    return rank;
}

/* The largest of its group, the first among equals. */
INLINE KEYS WITH(first_largest)(KEYS own, KEYS lane, int m) {
    KEYS high = own;
#pragma GCC unroll 8
    for (int away = 1; away < m; away *= 2) {
        const KEYS other = (KEYS)exchange((bare_64)high, away * (BITS / 8));
        high = WITH(LARGER)(other, high);
    }
    KEYS lowest = WITH(either)(high == own, lane, (KEYS){0} + (SIGNED)m);
#pragma GCC unroll 8
    for (int away = 1; away < m; away *= 2) {
        const KEYS other = (KEYS)exchange((bare_64)lowest, away * (BITS / 8));
        lowest = WITH(SMALLER)(other, lowest);
    }
    return lowest == lane;
}

/* Numbers first.. of whole vectors; returns how far it came. */
INLINE int64_t WITH(inside)(const nm_sweep *s, int64_t first, int64_t last, int m) {
    KEYS lane;
    for (int i = 0; i < LANES; i++) lane[i] = (SIGNED)(i % m);
    const int one = s->n == 1 && m > 4, streams = WITH(streams)(s, first);
    for (; first + LANES <= last; first += LANES) {
        const KEYS own = WITH(load)((const WORD *)s->weight + first) & POSITIVE;
        const KEYS keep = one ? WITH(first_largest)(own, lane, m) : WITH(beaten)(own, lane, m) < (SIGNED)s->n;
        if (streams) WITH(stream)(s, keep, first);
        else WITH(put)(s, keep, first);
    }
#if BYTES >= 32
    if (streams) _mm_sfence(); /* whoever is told that this part is done sees it */
#endif
    return first;
}

/* -- a group a lane ---------------------------------------------------------------------------------------------------------- */

/* keep: -1 for the n largest of own[0..m], lane by lane, else 0. */
INLINE void WITH(choose)(const KEYS *own, KEYS *keep, int64_t n, int64_t m) {
    if (m <= 8) { /* M (M - 1) / 2 comparisons */
        for (int64_t j = 0; j < m; j++) keep[j] = (KEYS){0} + (SIGNED)(m - 1 - j);
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = i + 1; j < m; j++) {
                const KEYS first = own[i] >= own[j];
                keep[i] += first;
                keep[j] -= first;
            }
        for (int64_t j = 0; j < m; j++) keep[j] = keep[j] < (SIGNED)n;
        return;
    }
    KEYS top[NM_WIDEST], room = (KEYS){0} + (SIGNED)n; /* the n largest by insertion; what equals the n-th stays while there is room */
    for (int64_t level = 0; level < n; level++) top[level] = (KEYS){0};
    for (int64_t j = 0; j < m; j++) {
        KEYS falling = own[j];
        for (int64_t level = 0; level < n; level++) {
            const KEYS high = WITH(LARGER)(falling, top[level]);
            falling = WITH(SMALLER)(falling, top[level]);
            top[level] = high;
        }
    }
    const KEYS nth = top[n - 1];
    for (int64_t j = 0; j < m; j++) room += own[j] > nth;
    for (int64_t j = 0; j < m; j++) {
        const KEYS tied = (own[j] == nth) & (room > 0);
        room += tied;
        keep[j] = tied | (own[j] > nth);
    }
}

/* Where row j of a unit begins. */
INLINE int64_t WITH(row)(const nm_sweep *s, int64_t unit, int64_t j) {
    const int64_t row = unit * s->m + j;
    return (s->order ? s->order[row] : row) * s->inner;
}

/* Units whose `inner` is at least LANES: the last vector overlaps the one before. */
INLINE void WITH(along)(const nm_sweep *s, int64_t first, int64_t last, int64_t m) {
    KEYS own[NM_WIDEST], keep[NM_WIDEST];
    int64_t at[NM_WIDEST];
    for (int64_t unit = first; unit < last; unit++) {
        for (int64_t j = 0; j < m; j++) at[j] = WITH(row)(s, unit, j);
        for (int64_t start = 0; start < s->inner; start += LANES) {
            const int64_t t = least(start, s->inner - LANES);
            for (int64_t j = 0; j < m; j++) own[j] = WITH(load)((const WORD *)s->weight + at[j] + t) & POSITIVE;
            WITH(choose)(own, keep, s->n, m);
            for (int64_t j = 0; j < m; j++) WITH(put)(s, keep[j], at[j] + t);
        }
    }
}

/* Copy `count` numbers, fewer than LANES; a whole vector if that stays below `room` numbers. */
INLINE void WITH(copy)(WORD *to, const WORD *from, int64_t count, int64_t room) {
    if (count == 1) *to = *from;
    else if (room >= LANES) *(WITH(keys_any) *)to = WITH(load)(from);
    else memcpy(to, from, (size_t)count * sizeof(WORD));
}

/* Units whose `inner` is less: as many as fit side by side into COLUMNS, a row for each position. Runs of `inner` numbers are
 * copied in the order of memory, whole vectors at a time: what is written beyond a run is overwritten by the next. */
INLINE void WITH(gathered)(const nm_sweep *s, int64_t first, int64_t last, int64_t m) {
    WORD raw[NM_WIDEST][COLUMNS + LANES];
    uint8_t marks[NM_WIDEST][COLUMNS + LANES];
    KEYS own[NM_WIDEST], keep[NM_WIDEST];
    const WORD *weight = s->weight;
    const int64_t inner = s->inner, step = COLUMNS / inner, end = last * m * inner;
    memset(raw, 0, sizeof raw);
    for (int64_t unit = first; unit < last; unit += step) {
        const int64_t units = least(step, last - unit);
        int64_t at = unit * m * inner;
        for (int64_t u = 0; u < units; u++)
            for (int64_t j = 0; j < m; j++, at += inner) WITH(copy)(raw[j] + u * inner, weight + at, inner, end - at);
        for (int64_t c = 0; c < units * inner; c += LANES) {
            for (int64_t j = 0; j < m; j++) own[j] = WITH(load)(raw[j] + c) & POSITIVE;
            WITH(choose)(own, keep, s->n, m);
            for (int64_t j = 0; j < m; j++) {
                if (s->kind == NM_MASK) *(WITH(bytes_any) *)(marks[j] + c) = __builtin_convertvector(keep[j] & 1, WITH(bytes));
                else *(WITH(keys_any) *)(raw[j] + c) = WITH(load)(raw[j] + c) & keep[j];
            }
        }
        at = unit * m * inner;
        if (s->kind != NM_MASK) {
            for (int64_t u = 0; u < units; u++)
                for (int64_t j = 0; j < m; j++, at += inner) WITH(copy)((WORD *)s->out + at, raw[j] + u * inner, inner, end - at);
            continue;
        }
        uint8_t *out = s->out;
        for (int64_t u = 0; u < units; u++)
            for (int64_t j = 0; j < m; j++, at += inner) {
                if (inner == 1) out[at] = marks[j][u];
                else if (end - at >= LANES) memcpy(out + at, marks[j] + u * inner, LANES);
                else memcpy(out + at, marks[j] + u * inner, (size_t)inner);
            }
    }
}

static void WITH(largest)(const nm_sweep *s, int64_t first, int64_t last) {
    const int64_t m = s->m;
    if (s->inner == 1 && !s->order) {
        int64_t at = first * m;
        if (m == 2) at = WITH(inside)(s, at, last * m, 2);
        if (m == 4 && LANES >= 4) at = WITH(inside)(s, at, last * m, 4);
        if (m == 8 && LANES >= 8) at = WITH(inside)(s, at, last * m, 8);
        if (m == 16 && LANES >= 16) at = WITH(inside)(s, at, last * m, 16);
        first = at / m;
    }
    if (s->inner >= LANES) {
        if (m == 4) WITH(along)(s, first, last, 4);
        else if (m == 8) WITH(along)(s, first, last, 8);
        else WITH(along)(s, first, last, m);
    } else {
        if (m == 4) WITH(gathered)(s, first, last, 4);
        else if (m == 8) WITH(gathered)(s, first, last, 8);
        else WITH(gathered)(s, first, last, m);
    }
}

#undef WITH
#undef WORD
#undef SIGNED
#undef KEYS
#undef LANES
#undef COLUMNS
#undef LARGE
#undef POSITIVE
#undef INLINE
