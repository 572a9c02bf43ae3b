// mhc_post: a thread carries its columns of all M streams, so h is read once.
#include <dsv4/dependent.cuh>
#include <dsv4/numbers.cuh>

using namespace dsv4;

namespace {

constexpr int M = 4;  // hc_mult of Flash and Pro

template <typename T>
__global__ void mhc_post(const T* y, const T* h, const float* post, const float* comb, T* out, int D, int64_t y_stride,
                         bool wide) {
    constexpr int W = wide_elements<T>;
    take_turn();
    const int64_t token = blockIdx.x;
    __shared__ float mix[M * M + M];
    if (threadIdx.x < M * M + M)
        mix[threadIdx.x] = threadIdx.x < M * M ? comb[token * M * M + threadIdx.x] : post[token * M + threadIdx.x - M * M];
    __syncthreads();
    const int d = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    if (d >= D) return;
    float in[M][W], from[W];
    load<W>(y + token * y_stride + d, from, D - d, wide);
#pragma unroll
    for (int j = 0; j < M; ++j) load<W>(h + (token * M + j) * D + d, in[j], D - d, wide);
#pragma unroll
    for (int k = 0; k < M; ++k) {
        float sum[W] = {};
#pragma unroll
        for (int j = 0; j < M; ++j)
#pragma unroll
            for (int i = 0; i < W; ++i) sum[i] = fmaf(in[j][i], mix[j * M + k], sum[i]);
#pragma unroll
        for (int i = 0; i < W; ++i) sum[i] = fmaf(from[i], mix[M * M + k], sum[i]);
        store<W>(out + (token * M + k) * D + d, sum, D - d, wide);
    }
}

template <typename T>
static cudaError_t run(const void* y, const void* h, const float* post, const float* comb, void* out, int64_t tokens,
                       int D, int64_t y_stride, cudaStream_t stream) {
    constexpr int W = wide_elements<T>;
    const bool wide = D % W == 0 && y_stride % W == 0 && aligned16(y) && aligned16(h) && aligned16(out);
    return launch_dependent(mhc_post<T>, tokens, ((D + W - 1) / W + 127) / 128, 128, 0, stream, static_cast<const T*>(y),
                            static_cast<const T*>(h), post, comb, static_cast<T*>(out), D, y_stride, wide);
}

}  // namespace

extern "C" int dsv4_mhc_post(const void* y, const void* h, const float* post, const float* comb, void* out,
                             int64_t tokens, int D, int64_t y_stride, int dtype, cudaStream_t stream) {
    if (tokens == 0) return cudaSuccess;
    auto go = dtype == BF16 ? run<bf16> : run<float>;
    return go(y, h, post, comb, out, tokens, D, y_stride, stream);
}
