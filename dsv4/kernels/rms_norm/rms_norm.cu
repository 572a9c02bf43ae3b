// rms_norm: one block per row.
#include <dsv4/dependent.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/reduce.cuh>

using namespace dsv4;

namespace {

template <typename T>
__global__ void rms_norm(const T* x, const float* weight, T* out, int64_t stride, int n, float eps, bool wide) {
    constexpr int W = wide_elements<T>;
    take_turn();
    const T* row = x + blockIdx.x * stride;
    float v[W], w[W], sum = 0.0f;
    for (int i = threadIdx.x * W; i < n; i += blockDim.x * W) {
        load<W>(row + i, v, n - i, wide);
#pragma unroll
        for (int k = 0; k < W; ++k) sum = fmaf(v[k], v[k], sum);
    }
    const float scale = rsqrtf(block_sum(sum) / static_cast<float>(n) + eps);
    for (int i = threadIdx.x * W; i < n; i += blockDim.x * W) {
        load<W>(row + i, v, n - i, wide);  // in L1 since the first pass
        load<W>(weight + i, w, n - i, wide);
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = v[k] * scale * w[k];
        store<W>(out + static_cast<int64_t>(blockIdx.x) * n + i, v, n - i, wide);
    }
}

template <typename T>
static cudaError_t run(const void* x, const float* weight, void* out, int64_t rows, int64_t stride, int n, float eps,
                       cudaStream_t stream) {
    constexpr int W = wide_elements<T>;
    const bool wide = n % W == 0 && stride % W == 0 && aligned16(x) && aligned16(weight) && aligned16(out);
    const int threads = min(512, ((n + W - 1) / W + 31) / 32 * 32);
    return launch_dependent(rms_norm<T>, rows, 1, threads, 0, stream, static_cast<const T*>(x), weight,
                            static_cast<T*>(out), stride, n, eps, wide);
}

}  // namespace

extern "C" int dsv4_rms_norm(const void* x, const float* weight, void* out, int64_t rows, int64_t stride, int n,
                             float eps, int dtype, cudaStream_t stream) {
    if (rows == 0 || n == 0) return cudaSuccess;
    return dtype == BF16 ? run<bf16>(x, weight, out, rows, stride, n, eps, stream)
                         : run<float>(x, weight, out, rows, stride, n, eps, stream);
}
