// swiglu: a thread per 16-byte access of each input. A NaN stays a NaN: comparisons, not fminf, do the clamp.
#include <dsv4/launch.cuh>
#include <dsv4/numbers.cuh>

using namespace dsv4;

namespace {

template <typename T>
__global__ void swiglu(const T* gate, const T* up, float* out, int n, int64_t gate_stride, int64_t up_stride,
                       float limit, bool wide) {
    constexpr int W = wide_elements<T>;
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    if (i >= n) return;
    float g[W], u[W];
    load<W>(gate + blockIdx.x * gate_stride + i, g, n - i, wide);
    load<W>(up + blockIdx.x * up_stride + i, u, n - i, wide);
#pragma unroll
    for (int k = 0; k < W; ++k) {
        if (limit != 0.0f) {
            g[k] = g[k] > limit ? limit : g[k];
            u[k] = u[k] > limit ? limit : u[k] < -limit ? -limit : u[k];
        }
        u[k] = g[k] / (1.0f + expf(-g[k])) * u[k];
    }
    store<W>(out + static_cast<int64_t>(blockIdx.x) * n + i, u, n - i, wide);
}

template <typename T>
static cudaError_t run(const void* gate, const void* up, float* out, int64_t rows, int n, int64_t gate_stride,
                       int64_t up_stride, float limit, cudaStream_t stream) {
    constexpr int W = wide_elements<T>;
    const bool wide = n % W == 0 && gate_stride % W == 0 && up_stride % W == 0 && aligned16(gate) && aligned16(up) &&
                      aligned16(out);
    return launch(swiglu<T>, rows, ((n + W - 1) / W + 127) / 128, 128, 0, 1, stream, static_cast<const T*>(gate),
                  static_cast<const T*>(up), out, n, gate_stride, up_stride, limit, wide);
}

}  // namespace

extern "C" int dsv4_swiglu(const void* gate, const void* up, float* out, int64_t rows, int n, int64_t gate_stride,
                           int64_t up_stride, float limit, int dtype, cudaStream_t stream) {
    if (rows == 0 || n == 0) return cudaSuccess;
    auto go = dtype == BF16 ? run<bf16> : run<float>;
    return go(gate, up, out, rows, n, gate_stride, up_stride, limit, stream);
}
