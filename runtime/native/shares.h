/* How a product is shared out: blocks of tokens, in conv groups, and rows in chunks where workers would not end together. */

typedef struct {
    int64_t blocks;            /* of units of tokens */
    int64_t row_chunks, chunk; /* tasks along rows; rows in each, a multiple of 16 */
} shares;

/* units: of tokens, in all; most: in a block */
static shares shares_of(const nm_job *j, int64_t units, int64_t most) {
    shares s = {.blocks = nm_up(units, most)};
    const int64_t workers = nm_max(1, j->threads), tiles = nm_tiles(j);
    if (s.blocks * j->groups < 4 * workers) {
        const int64_t even = nm_up(s.blocks, workers) * workers; /* as many for every worker, if they stay wide enough */
        if (units >= even * (most / 2)) s.blocks = even;
    }
    const int64_t all = s.blocks * j->groups;
    s.row_chunks = all % workers && all < 4 * workers ? nm_min(workers, tiles) : 1;
    s.chunk = nm_up(tiles, s.row_chunks) * NM_LANES;
    s.row_chunks = nm_up(j->rows, s.chunk);
    return s;
}
