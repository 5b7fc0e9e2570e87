/* Vectors whose lanes are exchanged with those `bytes` away: lane i with lane i ^ r. */

#define ALL_LANES __attribute__((vector_size(BYTES)))

typedef int16_t lanes_16 ALL_LANES;
typedef int32_t lanes_32 ALL_LANES;
typedef int64_t lanes_64 ALL_LANES;
typedef uint32_t bare_32 ALL_LANES;
typedef uint64_t bare_64 ALL_LANES;

#if BYTES == 64
#define BY_8(v) __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6)
#define BY_16(v) __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5)
#define BY_32(v) __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3)
#elif BYTES == 32
#define BY_8(v) __builtin_shufflevector(v, v, 1, 0, 3, 2)
#define BY_16(v) __builtin_shufflevector(v, v, 2, 3, 0, 1)
#define BY_32(v) (v)
#else
#define BY_8(v) __builtin_shufflevector(v, v, 1, 0)
#define BY_16(v) (v)
#define BY_32(v) (v)
#endif

static inline __attribute__((always_inline)) bare_64 exchange(bare_64 v, int bytes) {
    switch (bytes) {
    case 2: return (bare_64)((bare_32)v << 16 | (bare_32)v >> 16);
    case 4: return v << 32 | v >> 32;
    case 8: return BY_8(v);
    case 16: return BY_16(v);
    default: return BY_32(v);
    }
}

/* The larger and the smaller, lane by lane, where one instruction does it. */
#if BYTES == 64
#define LARGER_16(a, b) ((lanes_16)_mm512_max_epi16((__m512i)(a), (__m512i)(b)))
#define LARGER_32(a, b) ((lanes_32)_mm512_max_epi32((__m512i)(a), (__m512i)(b)))
#define LARGER_64(a, b) ((lanes_64)_mm512_max_epi64((__m512i)(a), (__m512i)(b)))
#define SMALLER_16(a, b) ((lanes_16)_mm512_min_epi16((__m512i)(a), (__m512i)(b)))
#define SMALLER_32(a, b) ((lanes_32)_mm512_min_epi32((__m512i)(a), (__m512i)(b)))
#define SMALLER_64(a, b) ((lanes_64)_mm512_min_epi64((__m512i)(a), (__m512i)(b)))
#elif BYTES == 32
#define LARGER_16(a, b) ((lanes_16)_mm256_max_epi16((__m256i)(a), (__m256i)(b)))
#define LARGER_32(a, b) ((lanes_32)_mm256_max_epi32((__m256i)(a), (__m256i)(b)))
#define LARGER_64(a, b) either_64((a) > (b), a, b)
#define SMALLER_16(a, b) ((lanes_16)_mm256_min_epi16((__m256i)(a), (__m256i)(b)))
#define SMALLER_32(a, b) ((lanes_32)_mm256_min_epi32((__m256i)(a), (__m256i)(b)))
#define SMALLER_64(a, b) either_64((a) < (b), a, b)
#else
#define LARGER_16(a, b) either_16((a) > (b), a, b)
#define LARGER_32(a, b) either_32((a) > (b), a, b)
#define LARGER_64(a, b) either_64((a) > (b), a, b)
#define SMALLER_16(a, b) either_16((a) < (b), a, b)
#define SMALLER_32(a, b) either_32((a) < (b), a, b)
#define SMALLER_64(a, b) either_64((a) < (b), a, b)
#endif
