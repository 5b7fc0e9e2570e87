/* x86-64-v4, vectors of 64 bytes. */
#include "sweep.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2")
#include <immintrin.h>
#define BYTES 64
#define SWEEP nm_sweep_avx512
#include "sweep_isa.h"
#endif
