// index_query: a warp per eight heads (include/dsv4/index_query.cuh).
#include <dsv4/dependent.cuh>
#include <dsv4/index_query.cuh>

using namespace dsv4;

namespace {

constexpr int WIDTH_BYTES = 256, WARPS = 4;

struct Arguments {
    const uint8_t* q;
    const float2* cis;
    uint8_t* out;
    uint32_t heads_in_all, heads;
    int dims;
    int64_t row_bytes, head_bytes, cis_stride;
    bool quantize;
};

__global__ void __launch_bounds__(WARPS * 32) index_query(const __grid_constant__ Arguments a) {
    take_turn();
    const int lane = threadIdx.x % 32;
    const uint32_t first = (blockIdx.x * WARPS + threadIdx.x / 32) * index::WARP_HEADS;
    if (first >= a.heads_in_all) return;
    const uint32_t own = min(first + lane / 4, a.heads_in_all - 1);
    const int64_t row = own / a.heads;
    const uint4* head = reinterpret_cast<const uint4*>(a.q + row * a.row_bytes + own % a.heads * a.head_bytes);
    index::HeadShare share = index::load_head(a.dims, lane % 4, [&](int chunk) { return head[chunk]; });
    float2 by[index::PAIRS];
#pragma unroll
    for (int i = 0; i < index::PAIRS; ++i)
        by[i] = share.first + i >= 0 ? a.cis[row * a.cis_stride + share.first + i] : make_float2(1.0f, 0.0f);
    index::turn(share, [&](int i) { return by[i]; });
    index::treat_heads(share, a.quantize, lane, [&](int head, int chunk, uint4 channels) {
        if (first + head < a.heads_in_all)
            reinterpret_cast<uint4*>(a.out + static_cast<int64_t>(first + head) * WIDTH_BYTES)[chunk] = channels;
    });
}

}  // namespace

extern "C" int dsv4_index_query(const void* q, const void* cis, void* out, int64_t rows, int heads, int dims,
                                int64_t row_stride, int64_t head_stride, int64_t cis_stride, int quantize,
                                cudaStream_t stream) {
    if (rows == 0 || heads == 0) return cudaSuccess;
    if (rows * heads > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (row_stride % 8 || head_stride % 8 || !aligned16(q) || !aligned16(out)) return cudaErrorMisalignedAddress;
    Arguments a = {};
    a.q = static_cast<const uint8_t*>(q), a.cis = static_cast<const float2*>(cis), a.out = static_cast<uint8_t*>(out);
    a.heads_in_all = static_cast<uint32_t>(rows * heads), a.heads = heads, a.dims = dims;
    a.row_bytes = 2 * row_stride, a.head_bytes = 2 * head_stride, a.cis_stride = cis_stride;
    a.quantize = quantize != 0;
    const int64_t each = WARPS * index::WARP_HEADS;
    return launch_dependent(index_query, (rows * heads + each - 1) / each, 1, WARPS * 32, 0, stream, a);
}
