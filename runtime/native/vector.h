/* Vectors of V floats, in the compiler's own extensions; V is chosen by the file that includes this. */
#include <string.h>

typedef float vf __attribute__((vector_size(4 * V)));
typedef float vfu __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * V)));

typedef float vh __attribute__((vector_size(2 * V))); /* half of one */

static inline vf load(const float *p) { return *(const vfu *)p; }
static inline void store(float *p, vf v) { *(vfu *)p = v; }
static inline vf splat(float x) { return x - (vf){0}; }
static inline vf pick(vi where, vf a, vf b) { return (vf)((where & (vi)a) | (~where & (vi)b)); } /* a where true */

/* The first ``count`` < V floats, or the lanes of a mask (others are zero); nothing else is read or written. */
#if V == 16
#define MASK(count) ((__mmask16)((1u << (count)) - 1))
static inline vf load_some(const float *p, int64_t count) { return (vf)_mm512_maskz_loadu_ps(MASK(count), p); }
static inline void store_some(float *p, vf v, int64_t count) { _mm512_mask_storeu_ps(p, MASK(count), (__m512)v); }
static inline vf load_lanes(const float *p, uint32_t mask) { return (vf)_mm512_maskz_loadu_ps((__mmask16)mask, p); }
#else
static inline vf load_some(const float *p, int64_t count) {
    vf v = {0};
    memcpy(&v, p, (size_t)count * 4);
    return v;
}
static inline void store_some(float *p, vf v, int64_t count) { memcpy(p, &v, (size_t)count * 4); }
#if V == 8
static inline vf load_lanes(const float *p, uint32_t mask) {
    const vi bit = {1, 2, 4, 8, 16, 32, 64, 128};
    return (vf)_mm256_maskload_ps(p, (__m256i)(((int32_t)mask & bit) == bit));
}
#else
static inline vf load_lanes(const float *p, uint32_t mask) {
    vf v = {0};
    for (int i = 0; i < V; i++)
        if (mask >> i & 1) v[i] = p[i];
    return v;
}
#endif
#endif

#if V == 16
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LOWER(a) __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31)
#define ROUNDS 4
#elif V == 8
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define LOWER(a) __builtin_shufflevector(a, a, 0, 1, 2, 3)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 9, 11, 13, 15)
#define ROUNDS 3
#else
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define LOWER(a) __builtin_shufflevector(a, a, 0, 1)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 5, 7)
#define ROUNDS 2
#endif

/* Rows become columns: each round deals the two halves of the list like cards. */
static inline __attribute__((always_inline)) void transpose(vf a[V]) {
#pragma GCC unroll 4
    for (int round = 0; round < ROUNDS; round++) {
        vf b[V];
#pragma GCC unroll 16
        for (int i = 0; i < V / 2; i++) {
            b[2 * i] = LOW(a[i], a[i + V / 2]);
            b[2 * i + 1] = HIGH(a[i], a[i + V / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < V; i++) a[i] = b[i];
    }
}

/* exp to about 2 units in the last place (Cephes' polynomial on [-ln2/2, ln2/2]); NaN stays NaN, beyond 88 it is infinite. */
static inline vf exponential(vf x) {
    const vf high = splat(88.0f), low = splat(-87.0f);
    const vi beyond = x > high;
    x = pick(beyond, high, x);
    x = pick(x < low, low, x);
    vf scaled = x * splat(1.44269504f);
    vi whole = __builtin_convertvector(scaled + pick(scaled < splat(0), splat(-0.5f), splat(0.5f)), vi);
    vf n = __builtin_convertvector(whole, vf);
    vf r = x - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
    vf p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    return pick(beyond, splat(__builtin_inff()), p * (vf)((whole + 127) << 23));
}

/* erf to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26) */
static inline vf error_function(vf x) {
    vf size = pick(x < splat(0), -x, x);
    vf t = splat(1.0f) / (splat(1.0f) + splat(0.3275911f) * size);
    vf p = splat(1.061405429f);
    p = p * t + splat(-1.453152027f);
    p = p * t + splat(1.421413741f);
    p = p * t + splat(-0.284496736f);
    p = p * t + splat(0.254829592f);
    vf e = splat(1.0f) - p * t * exponential(-size * size);
    return pick(x < splat(0), -e, e);
}

/* Between 0 and 6; NaN stays NaN. */
static inline vf clamp6(vf x) {
    x = pick(x < splat(0), splat(0), x);
    return pick(x > splat(6.0f), splat(6.0f), x);
}

static inline vf activate(vf x, int64_t activation) {
    vf one = splat(1.0f);
    switch (activation) {
    case NM_RELU: return pick(x < splat(0), splat(0), x);
    case NM_GELU: return splat(0.5f) * x * (one + error_function(x * splat(0.70710678f)));
    case NM_GELU_TANH: {
        vf u = splat(1.5957691216f) * (x + splat(0.044715f) * x * x * x); /* twice the argument of tanh */
        return x / (one + exponential(-u));
    }
    case NM_SILU: return x / (one + exponential(-x));
    case NM_RELU6: return clamp6(x);
    case NM_HARDSWISH: return x * (clamp6(x + splat(3.0f)) * splat(1.0f / 6));
    default: return x;
    }
}
