/* What the machine can do at best, for the benchmark that sets the kernels beside it. */

/* ``rounds`` times 12 independent multiply-adds of V floats in registers; returns how many floating-point operations that was */
static int64_t multiply_adds(int64_t rounds) {
    vf sums[12], a = splat(1.0f), b = splat(1e-9f);
    for (int i = 0; i < 12; i++) sums[i] = splat((float)i);
    __asm__ volatile("" : "+m"(a), "+m"(b));
    const vf x = a, y = b;
    for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 16
        for (int i = 0; i < 12; i++) sums[i] = sums[i] * x + y;
    }
    for (int i = 0; i < 12; i++) __asm__ volatile("" : : "m"(sums[i]));
    return rounds * 12 * V * 2;
}

/* read ``count`` floats, a multiple of 4 V, and do next to nothing with them */
static void read_all(const float *from, int64_t count) {
    vf sums[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (int64_t i = 0; i + 4 * V <= count; i += 4 * V)
        for (int k = 0; k < 4; k++) sums[k] += load(from + i + k * V);
    for (int k = 0; k < 4; k++) __asm__ volatile("" : : "m"(sums[k]));
}
