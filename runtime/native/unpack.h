/* The sums of a tile, 16 rows of tokens, into y: residual added, activation applied, turned back where y is channels-last. */

static void unpack_channels_last(const nm_job *j, int64_t row, int64_t rows, int64_t token0, int64_t tokens, int64_t nv, const float *sums) {
    for (int64_t t = 0; t < tokens; t += V)
        for (int64_t r = 0; r < rows; r += V) {
            const int64_t some = nm_min(V, rows - r), count = nm_min(V, tokens - t);
            vf a[V];
            for (int i = 0; i < V; i++) a[i] = *(const vf *)(sums + (r + i) * nv * V + t);
            transpose(a);
            for (int64_t i = 0; i < count; i++) {
                const int64_t place = (token0 + t + i) * j->ldy + row + r;
                if (some == V) {
                    vf y = a[i];
                    if (j->residual) y += load(j->residual + place);
                    store(j->y + place, activate(y, j->activation));
                } else {
                    vf y = a[i];
                    if (j->residual) y += load_some(j->residual + place, some);
                    store_some(j->y + place, activate(y, j->activation), some);
                }
            }
        }
}

static void unpack_channels_first(const nm_job *j, int64_t row, int64_t rows, int64_t token0, int64_t tokens, int64_t nv, const float *sums) {
    const int64_t area = j->out_h * j->out_w;
    for (int64_t t = 0; t < tokens;) {
        const int64_t image = (token0 + t) / area, inside = (token0 + t) % area, count = nm_min(tokens - t, area - inside);
        for (int64_t r = 0; r < rows; r++) {
            const float *from = sums + r * nv * V + t;
            const int64_t place = (image * j->ldy + row + r) * area + inside;
            int64_t i = 0;
            for (; i + V <= count; i += V) {
                vf y = load(from + i);
                if (j->residual) y += load(j->residual + place + i);
                store(j->y + place + i, activate(y, j->activation));
            }
            if (i < count) {
                vf y = load_some(from + i, count - i);
                if (j->residual) y += load_some(j->residual + place + i, count - i);
                store_some(j->y + place + i, activate(y, j->activation), count - i);
            }
        }
        t += count;
    }
}

static void unpack(const nm_job *j, int64_t group, int64_t row, int64_t token0, int64_t tokens, int64_t nv, const float *sums) {
    const int64_t rows = nm_min(NM_LANES, j->rows - row), channel = group * j->rows + row;
    if (j->channels_last) unpack_channels_last(j, channel, rows, token0, tokens, nv, sums);
    else unpack_channels_first(j, channel, rows, token0, tokens, nv, sums);
}
