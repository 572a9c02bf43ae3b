// q_norm_rope: one warp per head. In BF16 the square, the mean, mean + eps, the root and the product are each rounded.
#include <dsv4/dependent.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/reduce.cuh>
#include <dsv4/rope.cuh>

using namespace dsv4;

namespace {

constexpr int WARPS = 4;

template <typename T>
__global__ void q_norm_rope(const T* q, const float2* cis, T* out, int64_t rows, int heads, int n, int dims,
                            int64_t row_stride, int64_t head_stride, int64_t cis_stride, float eps, bool wide) {
    constexpr int W = wide_elements<T>;
    take_turn();
    const int64_t head = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (head >= rows * heads) return;
    const int64_t row = head / heads;
    const T* from = q + row * row_stride + head % heads * head_stride;
    const float2* turn = cis + row * cis_stride;
    const int lane = threadIdx.x % 32, fixed = n - dims;
    float v[W], sum = 0.0f;
    for (int i = lane * W; i < n; i += 32 * W) {
        load<W>(from + i, v, n - i, wide);
#pragma unroll
        for (int k = 0; k < W; ++k) sum += rounded<T>(v[k] * v[k]);
    }
    const float mean = rounded<T>(warp_sum(sum) / static_cast<float>(n));
    const float root = rounded<T>(rsqrtf(rounded<T>(mean + eps)));
    for (int i = lane * W; i < n; i += 32 * W) {
        load<W>(from + i, v, n - i, wide);  // in L1 since the first pass
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = rounded<T>(v[k] * root);
#pragma unroll
        for (int k = 0; k < W; k += 2)
            if (i + k >= fixed && i + k < n) rotate(v[k], v[k + 1], turn[(i + k - fixed) / 2]);
        store<W>(out + head * n + i, v, n - i, wide);
    }
}

template <typename T>
static cudaError_t run(const void* q, const void* cis, void* out, int64_t rows, int heads, int n, int dims,
                       int64_t row_stride, int64_t head_stride, int64_t cis_stride, float eps, cudaStream_t stream) {
    constexpr int W = wide_elements<T>;
    const bool wide = n % W == 0 && row_stride % W == 0 && head_stride % W == 0 && aligned16(q) && aligned16(out);
    return launch_dependent(q_norm_rope<T>, (rows * heads + WARPS - 1) / WARPS, 1, WARPS * 32, 0, stream,
                            static_cast<const T*>(q), static_cast<const float2*>(cis), static_cast<T*>(out), rows,
                            heads, n, dims, row_stride, head_stride, cis_stride, eps, wide);
}

}  // namespace

extern "C" int dsv4_q_norm_rope(const void* q, const void* cis, void* out, int64_t rows, int heads, int n, int dims,
                                int64_t row_stride, int64_t head_stride, int64_t cis_stride, float eps, int dtype,
                                cudaStream_t stream) {
    if (rows == 0 || heads == 0 || n == 0) return cudaSuccess;
    auto go = dtype == BF16 ? run<bf16> : run<float>;
    return go(q, cis, out, rows, heads, n, dims, row_stride, head_stride, cis_stride, eps, stream);
}
