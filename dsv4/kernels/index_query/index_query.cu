// index_query: one warp per head of 128 channels, four a lane. RoPE, then the Hadamard transform as seven butterflies
// (two in a lane, five between lanes) and the E2M1 rounding of groups of 32 channels, which are 8 lanes.
#include <dsv4/dependent.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/rope.cuh>

using namespace dsv4;

namespace {

constexpr int WIDTH = 128, EACH = WIDTH / 32, WARPS = 4, GROUP_LANES = 32 / EACH;

__device__ __forceinline__ void butterfly(float& a, float& b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
}

// Magnitude bits as the twin's amax sees them: a NaN is the largest.
__device__ __forceinline__ uint32_t group_amax(const float (&v)[EACH]) {
    uint32_t amax = 0;
#pragma unroll
    for (int k = 0; k < EACH; ++k) amax = max(amax, __float_as_uint(v[k]) & 0x7fffffffu);
#pragma unroll
    for (int step = GROUP_LANES / 2; step > 0; step /= 2) amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, step));
    return amax;
}

// The smallest power of two that brings the group's magnitudes to 6 or less.
__device__ __forceinline__ float group_scale(uint32_t amax) {
    const float low = 6.0f * 0x1p-126f, largest = __uint_as_float(amax);
    const float wanted = __fmul_rn(largest < low ? low : largest, static_cast<float>(1.0 / 6.0));
    return __uint_as_float((__float_as_uint(wanted) + 0x007fffffu) & 0x7f800000u);
}

// x rounded to E2M1 in units of scale, to nearest even: the addition of a number whose last place is the step rounds.
__device__ __forceinline__ float e2m1_rounded(float x, float scale) {
    const float y = __fdiv_rn(fabsf(x), scale);
    const float power = __uint_as_float(__float_as_uint(y < 1.0f ? 1.0f : y) & 0x7f800000u);
    const float magic = __fmul_rn(power, 6291456.0f);  // 1.5 * 2^22
    return copysignf(__fmul_rn(__fsub_rn(__fadd_rn(y, magic), magic), scale), x);
}

template <typename T>
__global__ void index_query(const T* q, const float2* cis, T* out, int64_t rows, int heads, int dims, int64_t row_stride,
                            int64_t head_stride, int64_t cis_stride, bool quantize, bool wide) {
    take_turn();
    const int64_t head = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (head >= rows * heads) return;
    const int64_t row = head / heads;
    const int lane = threadIdx.x % 32, first = lane * EACH, fixed = WIDTH - dims;
    float v[EACH];
    load<EACH>(q + row * row_stride + head % heads * head_stride + first, v, EACH, wide);
#pragma unroll
    for (int k = 0; k < EACH; k += 2)
        if (first + k >= fixed) {
            rotate(v[k], v[k + 1], cis[row * cis_stride + (first + k - fixed) / 2]);
            v[k] = rounded<T>(v[k]), v[k + 1] = rounded<T>(v[k + 1]);
        }
    if (quantize) {
        butterfly(v[0], v[1]), butterfly(v[2], v[3]);
        butterfly(v[0], v[2]), butterfly(v[1], v[3]);
#pragma unroll
        for (int step = 1; step < 32; step *= 2)
#pragma unroll
            for (int k = 0; k < EACH; ++k) {
                const float other = __shfl_xor_sync(0xffffffffu, v[k], step);
                v[k] = lane & step ? other - v[k] : v[k] + other;
            }
#pragma unroll
        for (int k = 0; k < EACH; ++k) v[k] = rounded<T>(__fmul_rn(v[k], 0.08838834764831845f));  // 128^-0.5
        const float scale = group_scale(group_amax(v));
#pragma unroll
        for (int k = 0; k < EACH; ++k) v[k] = e2m1_rounded(v[k], scale);
    }
    store<EACH>(out + head * WIDTH + first, v, EACH, wide);
}

template <typename T>
static cudaError_t run(const void* q, const void* cis, void* out, int64_t rows, int heads, int dims, int64_t row_stride,
                       int64_t head_stride, int64_t cis_stride, bool quantize, cudaStream_t stream) {
    const bool wide = row_stride % 8 == 0 && head_stride % 8 == 0 && aligned16(q) && aligned16(out);
    return launch_dependent(index_query<T>, (rows * heads + WARPS - 1) / WARPS, 1, WARPS * 32, 0, stream,
                            static_cast<const T*>(q), static_cast<const float2*>(cis), static_cast<T*>(out), rows,
                            heads, dims, row_stride, head_stride, cis_stride, quantize, wide);
}

}  // namespace

extern "C" int dsv4_index_query(const void* q, const void* cis, void* out, int64_t rows, int heads, int dims,
                                int64_t row_stride, int64_t head_stride, int64_t cis_stride, int quantize, int dtype,
                                cudaStream_t stream) {
    if (rows == 0 || heads == 0) return cudaSuccess;
    auto go = dtype == BF16 ? run<bf16> : run<float>;
    return go(q, cis, out, rows, heads, dims, row_stride, head_stride, cis_stride, quantize != 0, stream);
}
