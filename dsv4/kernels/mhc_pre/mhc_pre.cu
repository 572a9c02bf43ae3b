// mhc_pre: what mhc.cuh says, without a norm.
#include <dsv4/mhc_kernels.cuh>

using namespace dsv4;
using namespace dsv4::mhc;

namespace {

__device__ Words<PRE> words;

template <int TT, typename T>
__global__ void __launch_bounds__(Shape<PRE>::WORKERS, 2) mhc_pre(const __grid_constant__ Args<T> a) {
    enter_few<PRE, TT>(a, words);
}

template <int TT, typename T>
__global__ void __launch_bounds__(Shape<PRE>::WORKERS) mhc_pre_shares(const __grid_constant__ Args<T> a) {
    shares_of_many<PRE, TT>(a);
}

template <typename T>
__global__ void __launch_bounds__(Shape<PRE>::THREADS, ENDS<T>)
    mhc_pre_end(const __grid_constant__ Args<T> a, int slices) {
    enter_many<PRE>(a, slices);
}

template <typename T>
cudaError_t go(const void* h, const float* fn, const float* base, const float* scale, void* x, float* post, float* comb,
               float* shares, int64_t tokens, int D, int iters, float hc_eps, float norm_eps, cudaStream_t stream) {
    const bool wide = D % wide_elements<T> == 0 && aligned16(h) && aligned16(fn) && aligned16(x);
    Args<T> args = {};
    args.h = static_cast<const T*>(h), args.fn = fn, args.base = base, args.scale = scale;
    args.x_out = static_cast<T*>(x), args.post_out = post, args.comb_out = comb, args.shares = reinterpret_cast<float4*>(shares);
    args.tokens = tokens, args.D = D, args.iters = iters, args.hc_eps = hc_eps, args.norm_eps = norm_eps;
    args.wide = wide;
    const Kernels<T> kernels = {mhc_pre<1, T>, mhc_pre<2, T>, mhc_pre_shares<4, T>, mhc_pre_shares<8, T>, mhc_pre_end<T>};
    return run<PRE>(kernels, args, stream);
}

}  // namespace

extern "C" int dsv4_mhc_pre(const void* h, const float* fn, const float* base, const float* scale, void* x, float* post,
                            float* comb, float* shares, int64_t tokens, int D, int iters, float hc_eps, float norm_eps,
                            int dtype, cudaStream_t stream) {
    if (tokens == 0) return cudaSuccess;
    auto typed = dtype == BF16 ? go<bf16> : go<float>;
    return typed(h, fn, base, scale, x, post, comb, shares, tokens, D, iters, hc_eps, norm_eps, stream);
}
