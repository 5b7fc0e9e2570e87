/* x86-64-v4: 16 floats a vector, 32 registers. */
#include "job.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2")
#include <immintrin.h>
#define V 16
#if __GNUC__ >= 10 /* older ones do not know AVX512-BF16 */
#define NM_DOTS
#endif
#define MOST 8 /* with blocks of 56 the panel takes 28 of the 32 KiB of a first-level cache */
#define BLOCK 56
#define MOST_THIN 4
#define BLOCK_THIN 128
#define MOST_TOKENS 8
#define MOST_TOKENS_LOG 3
#define TABLE nm_avx512
#define NAME "avx512"
#include "isa.h"
#endif
