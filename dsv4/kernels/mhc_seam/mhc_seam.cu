// mhc_seam: what mhc.cuh says, with streams that are made on the way in.
#include <dsv4/mhc.cuh>

using namespace dsv4;
using namespace dsv4::mhc;

namespace {

__device__ Words<SEAM> words;

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

template <typename T>
cudaError_t go(const void* y, const void* h, const float* post, const float* comb, const float* fn, const float* base,
               const float* scale, const float* weight, void* h_out, void* x_out, float* post_out, float* comb_out,
               float* shares, int64_t tokens, int D, int64_t y_stride, int iters, float hc_eps, float norm_eps,
               uint64_t* const* inboxes, uint32_t* turns, int rank, int size, cudaStream_t stream) {
    constexpr int N = wide_elements<T>;
    const bool y_wide = size > 1 || (y_stride % N == 0 && aligned16(y));
    Args<T> args = {};
    args.h = static_cast<const T*>(h), args.post = post, args.comb = comb, args.fn = fn, args.base = base;
    args.scale = scale, args.weight = weight, args.h_out = static_cast<T*>(h_out), args.x_out = static_cast<T*>(x_out);
    args.post_out = post_out, args.comb_out = comb_out, args.shares = reinterpret_cast<float4*>(shares);
    args.tokens = tokens, args.y_stride = y_stride, args.D = D, args.iters = iters;
    args.hc_eps = hc_eps, args.norm_eps = norm_eps;
    args.wide = y_wide && D % N == 0 && aligned16(h) && aligned16(fn) && aligned16(weight) && aligned16(h_out) &&
                aligned16(x_out);
    if (size > MOST_RANKS) return cudaErrorInvalidValue;
    if (size > 1) {
        args.peers.part = static_cast<const float*>(y), args.peers.stride = y_stride;
        args.peers.turns = turns, args.peers.rank = rank, args.peers.size = size;
        for (int i = 0; i < size; ++i) args.peers.inboxes[i] = inboxes[i];
    } else {
        args.y = static_cast<const T*>(y);
    }
    const Kernels<T> kernels = {mhc_seam<1, T>, mhc_seam<2, T>, mhc_leave<4, T>, mhc_leave<8, T>, mhc_enter<T>};
    return run<SEAM>(kernels, args, stream);
}

}  // namespace

// size > 1: y is this rank's part in float32, inboxes the addresses of all ranks' (Peers in mhc.cuh).
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
