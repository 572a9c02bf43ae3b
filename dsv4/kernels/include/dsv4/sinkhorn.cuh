// Sinkhorn of a site's 4 x 4, by one thread.
#pragma once

namespace dsv4::mhc {

constexpr int SITE = 4;  // streams

// 1 / a and 1 / b from one reciprocal.
__device__ __forceinline__ void inverses(float& a, float& b) {
    float both;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(both) : "f"(__fmul_rn(a, b)));
    const float first = __fmul_rn(both, b);
    b = __fmul_rn(both, a), a = first;
}

// Sinkhorn of 4 x 4 numbers c as factors: rows[j] c[j][k] columns[k] after `iters` column steps with row steps between.
// A step divides, by its sum and eps: r_j c_jk s_k / (r_j sum_k c_jk s_k + eps), so 1 / r_j becomes
// sum_k c_jk s_k + eps / r_j. No error outlives the step after it.
__device__ __forceinline__ void half_step(const float (&c)[SITE][SITE], bool down, const float (&by)[SITE],
                                          float (&inverse)[SITE], float (&factor)[SITE], float eps) {
#pragma unroll
    for (int i = 0; i < SITE; ++i) {
        const float* entry = &c[0][0] + (down ? i : i * SITE);
        const int step = down ? SITE : 1;
        const float some = fmaf(entry[step], by[1], fmaf(entry[0], by[0], __fmul_rn(inverse[i], eps)));
        factor[i] = inverse[i] = __fadd_rn(some, fmaf(entry[3 * step], by[3], __fmul_rn(entry[2 * step], by[2])));
    }
    inverses(factor[0], factor[1]), inverses(factor[2], factor[3]);
}
__device__ __forceinline__ void sinkhorn(const float (&c)[SITE][SITE], float (&rows)[SITE], float (&columns)[SITE],
                                         int iters, float eps) {
    float over[SITE], under[SITE];  // 1 / rows, 1 / columns
#pragma unroll
    for (int i = 0; i < SITE; ++i) rows[i] = over[i] = under[i] = 1.0f;
    half_step(c, true, rows, under, columns, eps);
#pragma unroll 1
    for (int i = 1; i < iters; ++i) {
        half_step(c, false, columns, over, rows, eps);
        half_step(c, true, rows, under, columns, eps);
    }
}

}  // namespace dsv4::mhc
