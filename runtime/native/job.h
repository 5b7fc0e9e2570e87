/* What Python hands over: one array of 64-bit fields, in this order (runtime/native/job.py packs it). */
#ifndef NM_JOB_H
#define NM_JOB_H

#include <stddef.h>
#include <stdint.h>

#define NM_LANES 16 /* outputs that lie side by side in a packed weight: a tile of rows */

enum { NM_OK = 0, NM_BAD_CODE = 1, NM_SCRATCH = 2 };
enum { NM_F32 = 0, NM_BF16 = 1, NM_INT8 = 2 };
enum { NM_NONE = 0, NM_RELU = 1, NM_GELU = 2, NM_GELU_TANH = 3, NM_SILU = 4, NM_RELU6 = 5, NM_HARDSWISH = 6 };

/* A packed weight has, for every conv group and every tile of 16 rows, one column of 16 lanes for each kept position:
 *   values [groups, tiles, steps, 16]   steps = k / m * n, in the order of the groups along k
 *   codes  [groups, tiles, words, 16]   32 / bits codes a word, the first in the low bits; a code is a position in its group
 *   scales [groups, tiles, 16]          int8 values only
 * k = taps * inputs, inputs varying fastest. */
typedef struct {
    const float *x;        /* channels_last: [batch, in_h, in_w, ldx]; else [batch, ldx, in_h, in_w] */
    float *y;              /* the same with out_h, out_w, ldy */
    const float *residual; /* NULL, or laid out as y */
    const float *bias;     /* NULL, or [groups * rows] */
    const void *values;
    const uint32_t *codes;
    const float *scales;
    int64_t dtype, n, m;
    int64_t groups, rows, inputs; /* rows, inputs: of one conv group */
    int64_t batch, in_h, in_w, out_h, out_w;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int64_t ldx, ldy; /* channels of x and of y in all conv groups */
    int64_t channels_last;
    int64_t activation;
    int64_t few; /* the kernel for few tokens: one pixel a token, kernel 1x1, channels_last */
    int64_t halves; /* x, y and residual are bfloat16, and so are values (dots.h); channels_last */
    int64_t threads;
    char *scratch;
    int64_t scratch_bytes;
} nm_job;

/* What one instruction set offers. Workers run tasks of one job; each has its own scratch. */
typedef struct {
    const char *name;
    int64_t (*tasks)(const nm_job *);
    int64_t (*scratch)(const nm_job *); /* bytes a worker */
    int (*run)(const nm_job *, int64_t task, char *scratch);
    int64_t (*multiply_adds)(int64_t rounds);
    void (*read_all)(const float *from, int64_t count);
} nm_isa;

extern const nm_isa nm_avx512, nm_avx2, nm_portable;

static inline int64_t nm_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t nm_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t nm_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int nm_bits(int64_t m) { return m <= 4 ? 2 : m <= 16 ? 4 : 8; }
static inline int64_t nm_k(const nm_job *j) { return j->kernel_h * j->kernel_w * j->inputs; }
static inline int64_t nm_steps(const nm_job *j) { return nm_k(j) / j->m * j->n; }
static inline int64_t nm_words(const nm_job *j) { return nm_up(nm_steps(j), 32 / nm_bits(j->m)); }
static inline int64_t nm_tiles(const nm_job *j) { return nm_up(j->rows, NM_LANES); }
static inline int64_t nm_tokens(const nm_job *j) { return j->batch * j->out_h * j->out_w; }
static inline int64_t nm_value_bytes(const nm_job *j) { return j->dtype == NM_F32 ? 4 : j->dtype == NM_BF16 ? 2 : 1; }

#endif
