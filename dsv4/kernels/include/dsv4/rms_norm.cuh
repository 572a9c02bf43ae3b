// One row's RMS norm by a block.
#pragma once
#include <dsv4/numbers.cuh>
#include <dsv4/reduce.cuh>

namespace dsv4 {

// Threads for a row of n: a row has the same bits in any block of at least so many.
template <typename T>
inline int norm_threads(int n) {
    constexpr int W = wide_elements<T>;
    const int threads = ((n + W - 1) / W + 31) / 32 * 32;
    return threads < 512 ? threads : 512;
}

// The block's first norm_threads(n) threads work; all call this.
template <typename T>
__device__ void norm_row(const T* row, const float* weight, T* out, int n, float eps, bool wide, int threads) {
    constexpr int W = wide_elements<T>;
    float v[W] = {}, w[W] = {}, more[W], sum = 0.0f;
    const int first = threadIdx.x < threads ? threadIdx.x * W : n;
    if (first < n) {
        load<W>(row + first, v, n - first, wide);
        load<W>(weight + first, w, n - first, wide);
    }
#pragma unroll
    for (int k = 0; k < W; ++k) sum = fmaf(v[k], v[k], sum);
    for (int i = first + threads * W; i < n; i += threads * W) {
        load<W>(row + i, more, n - i, wide);
#pragma unroll
        for (int k = 0; k < W; ++k) sum = fmaf(more[k], more[k], sum);
    }
    const float scale = rsqrtf(block_sum(sum) / static_cast<float>(n) + eps);
    for (int i = first; i < n; i += threads * W) {
        if (i != first) {
            load<W>(row + i, v, n - i, wide);  // in L1 since the first pass
            load<W>(weight + i, w, n - i, wide);
        }
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = v[k] * scale * w[k];
        store<W>(out + i, v, n - i, wide);
    }
}

}  // namespace dsv4
