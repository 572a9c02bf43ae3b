// kv_append: one warp per token makes the entry and writes it twice, to the result and to the token's place in the ring.
#include <dsv4/dependent.cuh>
#include <dsv4/kv_store.cuh>

using namespace dsv4;

namespace {

struct Arguments {
    const void* kv;
    const float* weight;
    const float2* cis;
    const int64_t *write_rows, *write_to;
    void *ring, *out;
    int64_t rows, written, kv_stride, cis_stride;
    int n, dims, bytes;  // bytes: of a packed entry
    float eps;
    bool quantize, wide;
};

// Where token `row` goes in the ring, -1 for nowhere: write_rows rises.
__device__ int64_t place(const Arguments& a, int64_t row) {
    if (a.written == a.rows) return a.write_to[row];
    int64_t low = 0, high = a.written;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (a.write_rows[middle] < row)
            low = middle + 1;
        else
            high = middle;
    }
    return low < a.written && a.write_rows[low] == row ? a.write_to[low] : -1;
}

template <typename T, int ITER, bool PACKED>
__global__ void kv_append(const __grid_constant__ Arguments a) {
    take_turn();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= a.rows) return;
    const int64_t to = place(a, row);
    const T* from = static_cast<const T*>(a.kv) + row * a.kv_stride;
    kv_store::Row<ITER> entry;
#pragma unroll
    for (int it = 0; it < ITER; ++it) {
        const int i = kv_store::channel(it);
        load<8>(from + i, entry.v[it], a.n - i, a.wide && i < a.n);
    }
    kv_store::norm_rope<T>(entry.v, a.weight, a.cis + row * a.cis_stride, a.n, a.dims, a.eps, a.wide);
    if (PACKED || a.quantize) kv_store::round_entry(entry, a.n - a.dims);
    if constexpr (PACKED) {
        kv_store::store_entry(entry, static_cast<uint8_t*>(a.out) + row * a.bytes, a.n, a.dims, a.bytes);
        if (to >= 0) kv_store::store_entry(entry, static_cast<uint8_t*>(a.ring) + to * a.bytes, a.n, a.dims, a.bytes);
    } else {
        kv_store::store_values(entry, static_cast<T*>(a.out) + row * a.n, a.n, a.wide);
        if (to >= 0) kv_store::store_values(entry, static_cast<T*>(a.ring) + to * a.n, a.n, a.wide);
    }
}

template <typename T, bool PACKED>
cudaError_t run(const Arguments& a, cudaStream_t stream) {
    const int warps = a.rows < 512 ? 1 : 4;  // few rows: one to an SM
    auto kernel = a.n <= 256 ? kv_append<T, 1, PACKED> : a.n <= 512 ? kv_append<T, 2, PACKED> : kv_append<T, 4, PACKED>;
    return launch_dependent(kernel, (a.rows + warps - 1) / warps, 1, warps * 32, 0, stream, a);
}

}  // namespace

extern "C" int dsv4_kv_append(const void* kv, const float* weight, const float2* cis, void* ring,
                              const int64_t* write_rows, const int64_t* write_to, void* out, int64_t rows,
                              int64_t written, int64_t kv_stride, int64_t cis_stride, int n, int dims, int bytes,
                              float eps, int quantize, int dtype, cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    const int per_access = dtype == BF16 ? 8 : 4;
    const bool wide = n % 8 == 0 && kv_stride % per_access == 0 && aligned16(kv) && aligned16(weight) &&
                      (bytes > 0 || (aligned16(ring) && aligned16(out)));
    const Arguments a = {kv,      weight,    cis,        write_rows, write_to, ring, out, rows,
                         written, kv_stride, cis_stride, n,          dims,     bytes, eps, quantize != 0, wide};
    if (bytes > 0) return dtype == BF16 ? run<bf16, true>(a, stream) : cudaErrorInvalidValue;
    return dtype == BF16 ? run<bf16, false>(a, stream) : run<float, false>(a, stream);
}
