/* x86-64-v3: 8 floats a vector, 16 registers. */
#include "job.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,bmi,bmi2")
#include <immintrin.h>
#define V 8
#define MOST 10
#define BLOCK 64
#define MOST_THIN 8
#define BLOCK_THIN 128
#define MOST_TOKENS 4
#define MOST_TOKENS_LOG 2
#define TABLE nm_avx2
#define NAME "avx2"
#include "isa.h"
#endif
