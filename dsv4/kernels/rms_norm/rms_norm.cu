// rms_norm: one block per row.
#include <dsv4/dependent.cuh>
#include <dsv4/rms_norm.cuh>

using namespace dsv4;

namespace {

template <typename T>
__global__ void rms_norm(const T* x, const float* weight, T* out, int64_t stride, int n, float eps, bool wide) {
    take_turn();
    const int64_t row = blockIdx.x;
    norm_row(x + row * stride, weight, out + row * n, n, eps, wide, blockDim.x);
}

template <typename T>
static cudaError_t run(const void* x, const float* weight, void* out, int64_t rows, int64_t stride, int n, float eps,
                       cudaStream_t stream) {
    constexpr int W = wide_elements<T>;
    const bool wide = n % W == 0 && stride % W == 0 && aligned16(x) && aligned16(weight) && aligned16(out);
    return launch_dependent(rms_norm<T>, rows, 1, norm_threads<T>(n), 0, stream, static_cast<const T*>(x), weight,
                            static_cast<T*>(out), stride, n, eps, wide);
}

}  // namespace

extern "C" int dsv4_rms_norm(const void* x, const float* weight, void* out, int64_t rows, int64_t stride, int n,
                             float eps, int dtype, cudaStream_t stream) {
    if (rows == 0 || n == 0) return cudaSuccess;
    return dtype == BF16 ? run<bf16>(x, weight, out, rows, stride, n, eps, stream)
                         : run<float>(x, weight, out, rows, stride, n, eps, stream);
}
