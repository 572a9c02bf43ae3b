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

template <int W>
__device__ __forceinline__ float add_squares(const float (&v)[W], float sum) {
#pragma unroll
    for (int k = 0; k < W; ++k) sum = fmaf(v[k], v[k], sum);
    return sum;
}

// What a row is multiplied with, besides its weights, from the sum of its squares.
__device__ __forceinline__ float norm_scale(float sum, int n, float eps) {
    return rsqrtf(sum / static_cast<float>(n) + eps);
}
__device__ __forceinline__ float normed(float v, float scale, float weight) { return v * scale * weight; }

// The block's first norm_threads(n) threads work; all call this.
template <typename T>
__device__ void norm_row(const T* row, const float* weight, T* out, int n, float eps, bool wide, int threads) {
    constexpr int W = wide_elements<T>;
    float v[W] = {}, w[W] = {}, more[W];
    const int first = threadIdx.x < threads ? threadIdx.x * W : n;
    if (first < n) {
        load<W>(row + first, v, n - first, wide);
        load<W>(weight + first, w, n - first, wide);
    }
    float sum = add_squares(v, 0.0f);
    for (int i = first + threads * W; i < n; i += threads * W) {
        load<W>(row + i, more, n - i, wide);
        sum = add_squares(more, sum);
    }
    const float scale = norm_scale(block_sum(sum), n, eps);
    for (int i = first; i < n; i += threads * W) {
        if (i != first) {
            load<W>(row + i, v, n - i, wide);  // in L1 since the first pass
            load<W>(weight + i, w, n - i, wide);
        }
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = normed(v[k], scale, w[k]);
        store<W>(out + i, v, n - i, wide);
    }
}

// norm_row's sums for those who hold a BF16 row in another way: a warp brings 512 neighbouring elements, each lane 16 (zeros
// behind the row). Its lower half gets the sum of the first 256 of them, the upper half that of the others.
__device__ __forceinline__ float norm_share(const float (&v)[16]) {
    float sum[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sum[half] = 0.0f;
#pragma unroll
        for (int k = 0; k < 8; ++k) sum[half] = fmaf(v[8 * half + k], v[8 * half + k], sum[half]);
#pragma unroll
        for (int step = 8; step > 0; step /= 2) sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], step);
    }
    return sum[0] + sum[1];
}

// The scale of a row of up to 4096 from all its shares, in their order.
__device__ __forceinline__ float norm_scale(const float* shares, int count, int n, float eps) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < count; ++i) sum += shares[i];
    return norm_scale(sum, n, eps);
}

}  // namespace dsv4
