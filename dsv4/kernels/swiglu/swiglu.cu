// swiglu: a thread per 16-byte access of each input.
#include <dsv4/dependent.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/swiglu.cuh>

using namespace dsv4;

namespace {

template <typename T>
__global__ void activate(const T* gate, const T* up, T* out, int n, int64_t gate_stride, int64_t up_stride, float limit,
                         bool wide) {
    constexpr int W = wide_elements<T>;
    take_turn();
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    if (i >= n) return;
    float g[W], u[W];
    load<W>(gate + blockIdx.x * gate_stride + i, g, n - i, wide);
    load<W>(up + blockIdx.x * up_stride + i, u, n - i, wide);
#pragma unroll
    for (int k = 0; k < W; ++k) u[k] = swiglu(g[k], u[k], limit);
    store<W>(out + static_cast<int64_t>(blockIdx.x) * n + i, u, n - i, wide);
}

template <typename T>
static cudaError_t run(const void* gate, const void* up, void* out, int64_t rows, int n, int64_t gate_stride,
                       int64_t up_stride, float limit, cudaStream_t stream) {
    constexpr int W = wide_elements<T>;
    const bool wide = n % W == 0 && gate_stride % W == 0 && up_stride % W == 0 && aligned16(gate) && aligned16(up) &&
                      aligned16(out);
    return launch_dependent(activate<T>, rows, ((n + W - 1) / W + 127) / 128, 128, 0, stream,
                            static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(out), n,
                            gate_stride, up_stride, limit, wide);
}

}  // namespace

extern "C" int dsv4_swiglu(const void* gate, const void* up, void* out, int64_t rows, int n, int64_t gate_stride,
                           int64_t up_stride, float limit, int dtype, cudaStream_t stream) {
    if (rows == 0 || n == 0) return cudaSuccess;
    auto go = dtype == BF16 ? run<bf16> : run<float>;
    return go(gate, up, out, rows, n, gate_stride, up_stride, limit, stream);
}
