// mhc_seam: what mhc.cuh says, with streams that are made on the way in.
#include <dsv4/mhc_kernels.cuh>

using namespace dsv4;
using namespace dsv4::mhc;

namespace {

__device__ Words<SEAM> words;
__device__ WordsOfMany<SEAM> words_of_many;

template <int TT, typename T>
__global__ void __launch_bounds__(Shape<SEAM>::WORKERS, 2) mhc_seam(const __grid_constant__ Args<T> a) {
    enter_few<SEAM, TT>(a, words);
}

template <int TT, typename T>
__global__ void __launch_bounds__(Shape<SEAM>::WORKERS, 2) mhc_leave(const __grid_constant__ Args<T> a) {
    shares_of_many<SEAM, TT>(a);
}

template <typename T>
__global__ void __launch_bounds__(Shape<SEAM>::THREADS, ENDS<T>) mhc_enter(const __grid_constant__ Args<T> a, int slices) {
    enter_many<SEAM>(a, slices);
}

template <bool WIDE, typename T>
__global__ void __launch_bounds__(Together<SEAM>::BOUND)
    mhc_seam_together(const __grid_constant__ Args<T> a, int together) {
    enter_together<SEAM, WIDE>(a, words_of_many, together);
}

template <typename T>
cudaError_t go(const void* y, const void* h, const float* post, const float* comb, const float* fn, const float* base,
               const float* scale, const float* weight, void* h_out, void* x_out, float* post_out, float* comb_out,
               float* shares, int64_t tokens, int D, int64_t y_stride, int iters, float hc_eps, float norm_eps,
               uint64_t* const* inboxes, uint32_t* turns, int rank, int size, cudaStream_t stream) {
    Args<T> args = seam_args<T>(y, h, post, comb, fn, base, scale, weight, h_out, x_out, post_out, comb_out, tokens, D,
                                y_stride, iters, hc_eps, norm_eps, inboxes, turns, rank, size);
    args.shares = reinterpret_cast<float4*>(shares);
    const Kernels<T> kernels = {mhc_seam<1, T>,  mhc_seam<2, T>, mhc_leave<4, T>,
                                mhc_leave<8, T>, mhc_enter<T>,   mhc_seam_together<false, T>,
                                mhc_seam_together<USUAL<T>, T>};
    return run<SEAM>(kernels, args, stream);
}

}  // namespace

// size > 1: y is this rank's part in float32, inboxes the addresses of all ranks' (Peers in peers.cuh).
extern "C" int dsv4_mhc_seam(const void* y, const void* h, const float* post, const float* comb, const float* fn,
                             const float* base, const float* scale, const float* weight, void* h_out, void* x_out,
                             float* post_out, float* comb_out, float* shares, int64_t tokens, int D, int64_t y_stride,
                             int iters, float hc_eps, float norm_eps, int dtype, uint64_t* const* inboxes,
                             uint32_t* turns, int rank, int size, cudaStream_t stream) {
    if (tokens == 0) return cudaSuccess;
    auto typed = dtype == BF16 ? go<bf16> : go<float>;
    return typed(y, h, post, comb, fn, base, scale, weight, h_out, x_out, post_out, comb_out, shares, tokens, D,
                 y_stride, iters, hc_eps, norm_eps, inboxes, turns, rank, size, stream);
}
