// mhc_last: what mhc.cuh says, with streams that are made on the way in, M mixes, no Sinkhorn and no norm.
#include <dsv4/mhc_kernels.cuh>

using namespace dsv4;
using namespace dsv4::mhc;

namespace {

__device__ Words<FINAL> words;
__device__ WordsOfMany<FINAL> words_of_many;

template <int TT, typename T>
__global__ void __launch_bounds__(Shape<FINAL>::WORKERS, 2) mhc_last(const __grid_constant__ Args<T> a) {
    enter_few<FINAL, TT>(a, words);
}

template <int TT, typename T>
__global__ void __launch_bounds__(Shape<FINAL>::WORKERS, 2) mhc_last_shares(const __grid_constant__ Args<T> a) {
    shares_of_many<FINAL, TT>(a);
}

template <typename T>
__global__ void __launch_bounds__(Shape<FINAL>::THREADS) mhc_last_end(const __grid_constant__ Args<T> a, int slices) {
    enter_many<FINAL>(a, slices);
}

template <bool WIDE, typename T>
__global__ void __launch_bounds__(Together<FINAL>::BOUND)
    mhc_last_together(const __grid_constant__ Args<T> a, int together) {
    enter_together<FINAL, WIDE>(a, words_of_many, together);
}

template <typename T>
cudaError_t go(const void* y, const void* h, const float* post, const float* comb, const float* fn, const float* base,
               const float* scale, void* h_out, void* x, float* shares, int64_t tokens, int D, int64_t y_stride,
               float hc_eps, float norm_eps, uint64_t* const* inboxes, uint32_t* turns, int rank, int size,
               cudaStream_t stream) {
    Args<T> args = seam_args<T>(y, h, post, comb, fn, base, scale, nullptr, h_out, x, nullptr, nullptr, tokens, D,
                                y_stride, 0, hc_eps, norm_eps, inboxes, turns, rank, size);
    args.shares = reinterpret_cast<float4*>(shares);
    const Kernels<T> kernels = {mhc_last<1, T>,        mhc_last<2, T>,  mhc_last_shares<2, T>,
                                mhc_last_shares<4, T>, mhc_last_end<T>, mhc_last_together<false, T>,
                                mhc_last_together<USUAL<T>, T>};
    return run<FINAL>(kernels, args, stream);
}

}  // namespace

// size > 1: y is this rank's part in float32, inboxes the addresses of all ranks' (Peers in peers.cuh).
extern "C" int dsv4_mhc_last(const void* y, const void* h, const float* post, const float* comb, const float* fn,
                             const float* base, const float* scale, void* h_out, void* x, float* shares, int64_t tokens,
                             int D, int64_t y_stride, float hc_eps, float norm_eps, int dtype, uint64_t* const* inboxes,
                             uint32_t* turns, int rank, int size, cudaStream_t stream) {
    if (tokens == 0) return cudaSuccess;
    auto typed = dtype == BF16 ? go<bf16> : go<float>;
    return typed(y, h, post, comb, fn, base, scale, h_out, x, shares, tokens, D, y_stride, hc_eps, norm_eps, inboxes,
                 turns, rank, size, stream);
}
