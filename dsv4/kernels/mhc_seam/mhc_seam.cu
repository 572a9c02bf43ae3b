// mhc_seam: what mhc.cuh says, with streams that are made on the way in.
#include <dsv4/mhc.cuh>

using namespace dsv4;
using namespace dsv4::mhc;

namespace {

__device__ Words<SEAM> words;

template <typename T>
__global__ void __launch_bounds__(Shape<SEAM>::WORKERS, 2) mhc_seam(const __grid_constant__ Args<T> a) {
    enter_few(a, words);
}

template <int TT, typename T>
__global__ void __launch_bounds__(Shape<SEAM>::WORKERS) mhc_leave(const __grid_constant__ Args<T> a) {
    shares_of_many<SEAM, TT>(a);
}

template <typename T>
__global__ void __launch_bounds__(Shape<SEAM>::THREADS, ENDS<T>) mhc_enter(const __grid_constant__ Args<T> a, int slices) {
    enter_many<SEAM>(a, slices);
}

template <typename T>
cudaError_t go(const void* y, const void* h, const float* post, const float* comb, const float* fn, const float* base,
               const float* scale, const float* weight, void* h_out, void* x_out, float* post_out, float* comb_out,
               float* shares, int64_t tokens, int D, int64_t y_stride, int iters, float hc_eps, float norm_eps,
               cudaStream_t stream) {
    constexpr int N = wide_elements<T>;
    const bool wide = D % N == 0 && y_stride % N == 0 && aligned16(y) && aligned16(h) && aligned16(fn) &&
                      aligned16(weight) && aligned16(h_out) && aligned16(x_out);
    const Args<T> args = {static_cast<const T*>(y), static_cast<const T*>(h), post,     comb,     fn,     base,
                          scale, weight, static_cast<T*>(h_out), static_cast<T*>(x_out), post_out, comb_out, shares,
                          tokens, y_stride, D, iters, hc_eps, norm_eps, wide};
    return run<SEAM>(mhc_seam<T>, mhc_leave<4, T>, mhc_leave<8, T>, mhc_enter<T>, args, stream);
}

}  // namespace

extern "C" int dsv4_mhc_seam(const void* y, const void* h, const float* post, const float* comb, const float* fn,
                             const float* base, const float* scale, const float* weight, void* h_out, void* x_out,
                             float* post_out, float* comb_out, float* shares, int64_t tokens, int D, int64_t y_stride,
                             int iters, float hc_eps, float norm_eps, int dtype, cudaStream_t stream) {
    if (tokens == 0) return cudaSuccess;
    auto typed = dtype == BF16 ? go<bf16> : go<float>;
    return typed(y, h, post, comb, fn, base, scale, weight, h_out, x_out, post_out, comb_out, shares, tokens, D,
                 y_stride, iters, hc_eps, norm_eps, stream);
}
