// mhc_head: what mhc.cuh says, with M mixes, no Sinkhorn and no norm.
#include <dsv4/mhc_kernels.cuh>

using namespace dsv4;
using namespace dsv4::mhc;

namespace {

__device__ Words<HEAD> words;

template <int TT, typename T>
__global__ void __launch_bounds__(Shape<HEAD>::WORKERS, 2) mhc_head(const __grid_constant__ Args<T> a) {
    enter_few<HEAD, TT>(a, words);
}

template <int TT, typename T>
__global__ void __launch_bounds__(Shape<HEAD>::WORKERS) mhc_head_shares(const __grid_constant__ Args<T> a) {
    shares_of_many<HEAD, TT>(a);
}

template <typename T>
__global__ void __launch_bounds__(Shape<HEAD>::THREADS) mhc_head_end(const __grid_constant__ Args<T> a, int slices) {
    enter_many<HEAD>(a, slices);
}

template <typename T>
cudaError_t go(const void* h, const float* fn, const float* base, const float* scale, void* x, float* shares,
               int64_t tokens, int D, float hc_eps, float norm_eps, cudaStream_t stream) {
    const bool wide = D % wide_elements<T> == 0 && aligned16(h) && aligned16(fn) && aligned16(x);
    Args<T> args = {};
    args.h = static_cast<const T*>(h), args.fn = fn, args.base = base, args.scale = scale;
    args.x_out = static_cast<T*>(x), args.shares = reinterpret_cast<float4*>(shares), args.tokens = tokens, args.D = D;
    args.hc_eps = hc_eps, args.norm_eps = norm_eps, args.wide = wide;
    const Kernels<T> kernels = {mhc_head<1, T>, mhc_head<2, T>, mhc_head_shares<4, T>, mhc_head_shares<8, T>, mhc_head_end<T>};
    return run<HEAD>(kernels, args, stream);
}

}  // namespace

extern "C" int dsv4_mhc_head(const void* h, const float* fn, const float* base, const float* scale, void* x,
                             float* shares, int64_t tokens, int D, float hc_eps, float norm_eps, int dtype,
                             cudaStream_t stream) {
    if (tokens == 0) return cudaSuccess;
    auto typed = dtype == BF16 ? go<bf16> : go<float>;
    return typed(h, fn, base, scale, x, shares, tokens, D, hc_eps, norm_eps, stream);
}
