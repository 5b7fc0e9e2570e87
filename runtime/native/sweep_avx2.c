/* x86-64-v3, vectors of 32 bytes. */
#include "sweep.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,bmi,bmi2")
#include <immintrin.h>
#define BYTES 32
#define SWEEP nm_sweep_avx2
#include "sweep_isa.h"
#endif
