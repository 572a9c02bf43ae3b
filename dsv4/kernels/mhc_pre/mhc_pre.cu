// mhc_pre: a cluster of 8 blocks per token, or per 4 tokens when there are many (fn is then read once for the four).
#include <dsv4/dependent.cuh>
#include <dsv4/mhc.cuh>

using namespace dsv4;
using namespace dsv4::mhc;

namespace {

constexpr int ROWS = (2 + M) * M;  // pre | post | comb

// Lane 4 r + c of a half warp holds entry (r, c): rows are summed over lanes 1 and 2 apart, columns over 4 and 8.
__device__ __forceinline__ float sum_over(float x, int step) {
    x += __shfl_xor_sync(0xffffffffu, x, step);
    return x + __shfl_xor_sync(0xffffffffu, x, 2 * step);
}

__device__ float sinkhorn(float logit, int iters, float eps) {
    float top = fmaxf(logit, __shfl_xor_sync(0xffffffffu, logit, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    float c = expf(logit - top);
    c = c / sum_over(c, 1) + eps;
    c = c / (sum_over(c, M) + eps);
    for (int i = 1; i < iters; ++i) {
        c = c / (sum_over(c, 1) + eps);
        c = c / (sum_over(c, M) + eps);
    }
    return c;
}

template <int TT, typename T>
__global__ void __launch_bounds__(THREADS) mhc_pre(const T* h, const float* fn, const float* base, const float* scale,
                                                   T* x, float* post, float* comb, int64_t tokens, int D, int iters,
                                                   float hc_eps, float norm_eps, bool wide) {
    __shared__ Sums<ROWS, TT> s;
    take_turn();
    const int64_t token = static_cast<int64_t>(blockIdx.x / CLUSTER) * TT;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    mixes<ROWS, TT>(s, h, fn, token, tokens, D, wide);
    float z = 0.0f;
    if (warp < TT) {
        if (lane < ROWS) z = mix(s, warp, lane, D, scale[lane], base[lane], norm_eps);
        if (lane < M) s.pre[warp][lane] = sigmoid(z) + hc_eps;
    }
    __syncthreads();
    if (cluster_rank() == 0 && warp < TT && token + warp < tokens) {  // the other warps collapse meanwhile
        const float c = sinkhorn(__shfl_sync(0xffffffffu, z, 2 * M + lane % (M * M)), iters, hc_eps);
        if (lane < M * M) comb[(token + warp) * M * M + lane] = c;
        if (lane >= M && lane < 2 * M) post[(token + warp) * M + lane - M] = 2.0f * sigmoid(z);
    }
    collapse(s, h, x, token, tokens, D, wide);
    cluster_wait();  // nobody leaves while another block may still read its sums
}

template <typename T>
static cudaError_t run(const void* h, const float* fn, const float* base, const float* scale, void* x, float* post,
                       float* comb, int64_t tokens, int D, int iters, float hc_eps, float norm_eps,
                       cudaStream_t stream) {
    constexpr int MANY = 4;
    const bool wide = D % W == 0 && aligned16(h) && aligned16(fn) && aligned16(x);
    const bool many = tokens > 32;
    const int64_t clusters = many ? (tokens + MANY - 1) / MANY : tokens;
    return launch_dependent_clusters(many ? mhc_pre<MANY, T> : mhc_pre<1, T>, clusters * CLUSTER, THREADS, 0, CLUSTER,
                                     stream, static_cast<const T*>(h), fn, base, scale, static_cast<T*>(x), post, comb,
                                     tokens, D, iters, hc_eps, norm_eps, wide);
}

}  // namespace

extern "C" int dsv4_mhc_pre(const void* h, const float* fn, const float* base, const float* scale, void* x, float* post,
                            float* comb, int64_t tokens, int D, int iters, float hc_eps, float norm_eps, int dtype,
                            cudaStream_t stream) {
    if (tokens == 0) return cudaSuccess;
    auto go = dtype == BF16 ? run<bf16> : run<float>;
    return go(h, fn, base, scale, x, post, comb, tokens, D, iters, hc_eps, norm_eps, stream);
}
