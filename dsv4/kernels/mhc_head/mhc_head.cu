// mhc_head: as mhc_pre with M mixes and no Sinkhorn.
#include <dsv4/dependent.cuh>
#include <dsv4/mhc.cuh>

using namespace dsv4;
using namespace dsv4::mhc;

namespace {

template <typename T>
__global__ void __launch_bounds__(THREADS) mhc_head(const T* h, const float* fn, const float* base, const float* scale,
                                                    T* x, int64_t tokens, int D, float hc_eps, float norm_eps,
                                                    bool wide) {
    __shared__ Sums<M, 1> s;
    take_turn();
    const int64_t token = blockIdx.x / CLUSTER;
    mixes<M, 1>(s, h, fn, token, tokens, D, wide);
    if (threadIdx.x < M) {
        s.pre[0][threadIdx.x] =
            sigmoid(mix(s, 0, threadIdx.x, D, scale[0], base[threadIdx.x], norm_eps)) + hc_eps;
    }
    __syncthreads();
    collapse(s, h, x, token, tokens, D, wide);
    cluster_wait();  // nobody leaves while another block may still read its sums
}

template <typename T>
static cudaError_t run(const void* h, const float* fn, const float* base, const float* scale, void* x, int64_t tokens,
                       int D, float hc_eps, float norm_eps, cudaStream_t stream) {
    const bool wide = D % W == 0 && aligned16(h) && aligned16(fn) && aligned16(x);
    return launch_dependent_clusters(mhc_head<T>, tokens * CLUSTER, THREADS, 0, CLUSTER, stream,
                                     static_cast<const T*>(h), fn, base, scale, static_cast<T*>(x), tokens, D, hc_eps,
                                     norm_eps, wide);
}

}  // namespace

extern "C" int dsv4_mhc_head(const void* h, const float* fn, const float* base, const float* scale, void* x,
                             int64_t tokens, int D, float hc_eps, float norm_eps, int dtype, cudaStream_t stream) {
    if (tokens == 0) return cudaSuccess;
    auto go = dtype == BF16 ? run<bf16> : run<float>;
    return go(h, fn, base, scale, x, tokens, D, hc_eps, norm_eps, stream);
}
