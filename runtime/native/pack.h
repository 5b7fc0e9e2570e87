/* A block of x along k for some tokens, transposed into the panel: panel[position along k][token]. All data layouts, strides,
 * paddings and dilations live here; what lies outside an image or beyond the last token is zero. */

typedef struct { int64_t image, h, w; } pixel; /* of the output */

static inline pixel pixel_of(const nm_job *j, int64_t token) {
    const int64_t area = j->out_h * j->out_w, inside = token % area;
    return (pixel){token / area, inside / j->out_w, inside % j->out_w};
}

static inline pixel next_pixel(const nm_job *j, pixel at) {
    if (++at.w == j->out_w) {
        at.w = 0;
        if (++at.h == j->out_h) at.h = 0, at.image++;
    }
    return at;
}

/* x + group's first channel for every token under one tap, NULL where there is none */
static void pixels_under(const nm_job *j, int64_t group, int64_t tap, int64_t token0, int64_t tokens, int64_t room,
                         const float **from) {
    const float *x = j->x + group * j->inputs;
    const int64_t down = tap / j->kernel_w * j->dilation_h - j->pad_h, right = tap % j->kernel_w * j->dilation_w - j->pad_w;
    pixel at = pixel_of(j, token0);
    for (int64_t t = 0; t < tokens; t++, at = next_pixel(j, at)) {
        const int64_t h = at.h * j->stride_h + down, w = at.w * j->stride_w + right;
        const int inside = h >= 0 && h < j->in_h && w >= 0 && w < j->in_w;
        from[t] = inside ? x + ((at.image * j->in_h + h) * j->in_w + w) * j->ldx : 0;
    }
    for (int64_t t = tokens; t < room; t++) from[t] = 0;
}

static void pack_channels_last(const float **from, int64_t c0, int64_t count, int64_t room, float *panel) {
    for (int64_t t = 0; t < room; t += V)
        for (int64_t c = 0; c < count; c += V) {
            const int64_t some = nm_min(V, count - c);
            vf a[V];
            if (some == V)
                for (int i = 0; i < V; i++) a[i] = from[t + i] ? load(from[t + i] + c0 + c) : splat(0);
            else
                for (int i = 0; i < V; i++) a[i] = from[t + i] ? load_some(from[t + i] + c0 + c, some) : splat(0);
            transpose(a);
            for (int i = 0; i < some; i++) *(vf *)(panel + (c + i) * room + t) = a[i];
        }
}

/* tokens side by side in x under one tap: from a plane's ``source`` on to ``place`` in a row of the panel */
typedef struct { int64_t place, count, source; } run_of_tokens;

static int64_t runs_under(const nm_job *j, int64_t tap, int64_t token0, int64_t tokens, run_of_tokens *runs) {
    const int64_t down = tap / j->kernel_w * j->dilation_h - j->pad_h, right = tap % j->kernel_w * j->dilation_w - j->pad_w;
    /* w * stride + right lies in [0, in_w) for w in [low, high) */
    const int64_t low = right < 0 ? nm_up(-right, j->stride_w) : 0;
    const int64_t high = right < j->in_w ? (j->in_w - 1 - right) / j->stride_w + 1 : 0;
    int64_t found = 0;
    pixel at = pixel_of(j, token0);
    for (int64_t t = 0; t < tokens;) {
        const int64_t length = nm_min(j->out_w - at.w, tokens - t), h = at.h * j->stride_h + down;
        const int64_t begin = nm_max(at.w, low), end = nm_min(at.w + length, high);
        if (h >= 0 && h < j->in_h && begin < end) {
            const int64_t plane = at.image * j->ldx * j->in_h * j->in_w + h * j->in_w;
            runs[found++] = (run_of_tokens){t + begin - at.w, end - begin, plane + begin * j->stride_w + right};
        }
        t += length;
        at.w += length - 1;
        at = next_pixel(j, at);
    }
    return found;
}

static inline void copy_run(float *to, const float *from, int64_t count, int64_t stride) {
    int64_t i = 0;
    if (stride == 2)
        for (; i + V <= count; i += V) {
            const vf a = load(from + 2 * i), b = load(from + 2 * i + V - 1); /* the second ends at the last one needed */
            store(to + i, EVEN(a, b));
        }
    for (; i < count; i++) to[i] = from[i * stride];
}

/* A row of ``room`` tokens in pieces of up to V lanes, each from one run: masked lanes are read, the others are zero. A piece
 * ends early where the next run begins; it may be stored whole before the next one is, which mends what it overwrote. */
typedef struct { int64_t place, source; uint32_t mask; } piece;

static int64_t pieces_of(const run_of_tokens *runs, int64_t found, int64_t room, piece *pieces) {
    int64_t count = 0, r = 0;
    for (int64_t place = 0, size; place < room; place += size) {
        size = nm_min(V, room - place);
        while (r < found && runs[r].place + runs[r].count <= place) r++;
        piece now = {place, 0, 0};
        if (r < found && runs[r].place < place + size) {
            if (r + 1 < found) size = nm_min(size, nm_max(runs[r + 1].place - place, 1));
            const int64_t low = nm_max(0, runs[r].place - place), high = nm_min(size, runs[r].place + runs[r].count - place);
            now.source = runs[r].source + place - runs[r].place;
            now.mask = (uint32_t)((1ull << high) - (1ull << low));
        }
        pieces[count++] = now;
    }
    return count;
}

static void pack_in_pieces(const float *planes, int64_t area, const piece *pieces, int64_t found, int64_t count, int64_t room, float *panel) {
    for (int64_t c = 0; c < count; c++, planes += area, panel += room)
        for (int64_t i = 0; i < found; i++) {
            const vf lanes = load_lanes(planes + pieces[i].source, pieces[i].mask);
            float *to = panel + pieces[i].place;
            if (pieces[i].place + V <= room) store(to, lanes);
            else store_some(to, lanes, room - pieces[i].place);
        }
}

/* with a stride along the width: lanes are gathered */
static void pack_strided(const float *planes, int64_t area, const run_of_tokens *runs, int64_t found, int64_t stride, int64_t count,
                         int64_t room, float *panel) {
    for (int64_t c = 0; c < count; c++, planes += area, panel += room) {
        for (int64_t t = 0; t < room; t += V) *(vf *)(panel + t) = splat(0);
        for (int64_t r = 0; r < found; r++) copy_run(panel + runs[r].place, planes + runs[r].source, runs[r].count, stride);
    }
}

static void pack(const nm_job *j, int64_t group, int64_t k0, int64_t k1, int64_t token0, int64_t tokens, int64_t nv, float *panel) {
    const float *from[MOST * V];
    run_of_tokens runs[MOST * V];
    piece pieces[MOST * V];
    const int64_t room = nv * V, area = j->in_h * j->in_w;
    for (int64_t k = k0; k < k1;) {
        const int64_t tap = k / j->inputs, c0 = k % j->inputs, count = nm_min(j->inputs - c0, k1 - k);
        float *rows = panel + (k - k0) * room;
        if (j->channels_last) {
            pixels_under(j, group, tap, token0, tokens, room, from);
            pack_channels_last(from, c0, count, room, rows);
        } else {
            const float *planes = j->x + (group * j->inputs + c0) * area;
            const int64_t found = runs_under(j, tap, token0, tokens, runs);
            if (j->stride_w == 1) pack_in_pieces(planes, area, pieces, pieces_of(runs, found, room, pieces), count, room, rows);
            else pack_strided(planes, area, runs, found, j->stride_w, count, room, rows);
        }
        k += count;
    }
}
