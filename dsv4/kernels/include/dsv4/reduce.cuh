// Sums over a warp and a block; those of floats always in the same order: a row's bits do not depend on the rows beside it.
#pragma once
#include <cstdint>

namespace dsv4 {

// Over LANES neighbours, each of whom gets it.
template <int LANES>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
__device__ __forceinline__ float warp_sum(float x) { return lane_sum<32>(x); }

// The sum over the lanes up to this one.
__device__ __forceinline__ uint32_t sum_up_to(uint32_t x) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t before = __shfl_up_sync(0xffffffffu, x, step);
        if (lane >= step) x += before;
    }
    return x;
}

// Every thread gets the sum. The block has whole warps, all of which call this, once per kernel.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float parts[32];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll 4
    for (int warp = 0; warp < blockDim.x / 32; ++warp) sum += parts[warp];
    return sum;
}

}  // namespace dsv4
