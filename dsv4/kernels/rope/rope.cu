// rope: in place; a thread turns the pairs of one 16-byte access.
#include <dsv4/dependent.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/rope.cuh>

using namespace dsv4;

namespace {

template <typename T>
__global__ void rope(T* tail, const float2* cis, int64_t rows, int heads, int dims, int64_t row_stride,
                     int64_t head_stride, int64_t cis_stride, bool wide) {
    constexpr int W = wide_elements<T>;
    take_turn();
    const int vectors = (dims + W - 1) / W;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= rows * heads * vectors) return;
    const int d = i % vectors * W, left = dims - d;
    const int64_t row = i / vectors / heads;
    T* p = tail + row * row_stride + i / vectors % heads * head_stride + d;
    const float2* turn = cis + row * cis_stride + d / 2;
    float v[W];
    load<W>(p, v, left, wide);
#pragma unroll
    for (int k = 0; k < W; k += 2)
        if (k < left) rotate(v[k], v[k + 1], turn[k / 2]);
    store<W>(p, v, left, wide);
}

template <typename T>
static cudaError_t run(void* x, const void* cis, int64_t rows, int heads, int n, int dims, int64_t row_stride,
                       int64_t head_stride, int64_t cis_stride, cudaStream_t stream) {
    constexpr int W = wide_elements<T>;
    T* tail = static_cast<T*>(x) + (n - dims);
    const bool wide = dims % W == 0 && row_stride % W == 0 && head_stride % W == 0 && aligned16(tail);
    const int64_t threads = rows * heads * ((dims + W - 1) / W);
    return launch_dependent(rope<T>, (threads + 127) / 128, 1, 128, 0, stream, tail, static_cast<const float2*>(cis), rows,
                            heads, dims, row_stride, head_stride, cis_stride, wide);
}

}  // namespace

extern "C" int dsv4_rope(void* x, const void* cis, int64_t rows, int heads, int n, int dims, int64_t row_stride,
                         int64_t head_stride, int64_t cis_stride, int dtype, cudaStream_t stream) {
    if (rows == 0 || heads == 0 || dims == 0) return cudaSuccess;
    return dtype == BF16 ? run<bf16>(x, cis, rows, heads, n, dims, row_stride, head_stride, cis_stride, stream)
                         : run<float>(x, cis, rows, heads, n, dims, row_stride, head_stride, cis_stride, stream);
}
