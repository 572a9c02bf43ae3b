// A token's KV entry, by one warp, into the result and the token's place in the ring.
#pragma once
#include <dsv4/kv_store.cuh>
#include <dsv4/launch.cuh>

namespace dsv4::kv_append {

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

// The parameters of a launcher, and the arguments they make.
#define KV_APPEND_PARAMETERS                                                                                      \
    const void *kv, const float *weight, const float2 *cis, void *ring, const int64_t *write_rows,                \
        const int64_t *write_to, void *out, int64_t rows, int64_t written, int64_t kv_stride, int64_t cis_stride, \
        int n, int dims, int bytes, float eps, int quantize, int dtype
#define KV_APPEND_VALUES \
    kv, weight, cis, ring, write_rows, write_to, out, rows, written, kv_stride, cis_stride, n, dims, bytes, eps, quantize, dtype

inline Arguments arguments(KV_APPEND_PARAMETERS) {
    const int per_access = dtype == BF16 ? 8 : 4;
    const bool wide = n % 8 == 0 && kv_stride % per_access == 0 && aligned16(kv) && aligned16(weight) &&
                      (bytes > 0 || (aligned16(ring) && aligned16(out)));
    return {kv,      weight,    cis,        write_rows, write_to, ring,  out, rows,
            written, kv_stride, cis_stride, n,          dims,     bytes, eps, quantize != 0, wide};
}

// Where token `row` goes in the ring, -1 for nowhere: write_rows rises.
__device__ inline int64_t place(const Arguments& a, int64_t row) {
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

__device__ __forceinline__ kv_store::Form form(const Arguments& a, int64_t row, bool packed) {
    return {a.weight, a.cis + row * a.cis_stride, a.n,    a.dims,                a.bytes, a.eps,
            0.0f,     a.wide,                     packed || a.quantize, packed, false};
}

template <typename T, int ITER, bool PACKED>
__device__ void append(const Arguments& a, int64_t row) {
    const int64_t to = place(a, row);
    const T* from = static_cast<const T*>(a.kv) + row * a.kv_stride;
    kv_store::Row<ITER> entry = {};
#pragma unroll
    for (int it = 0; it < ITER; ++it)
        kv_store::load_channels<false>(from, entry.v[it], kv_store::channel(it), a.n, a.wide);
    const kv_store::Form made = form(a, row, PACKED);
    kv_store::make<T, false>(entry, made);
#pragma unroll 1
    for (int target = 0; target < 2; ++target) {
        if (target == 1 && to < 0) return;
        kv_store::put<T, false>(entry, made, target == 0 ? a.out : a.ring, target == 0 ? row : to);
    }
}

}  // namespace dsv4::kv_append
