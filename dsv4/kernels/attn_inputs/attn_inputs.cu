// attn_inputs: a row and blockIdx.y of a block: the norm of the query's low rank, the window's entry, the compressor's
// token and that of the indexer's. What takes longest comes first.
#include <dsv4/compress.cuh>
#include <dsv4/dependent.cuh>
#include <dsv4/kv_append.cuh>
#include <dsv4/rms_norm.cuh>

using namespace dsv4;

namespace {

constexpr int MOST_THREADS = compress::MAX_THREADS, ITER = 2;  // entries of up to 512 channels

enum Part { ENTRIES, KEYS, APPEND, NORM, PARTS };

struct Arguments {
    const bf16* qr;
    const float* q_weight;
    bf16* normed;
    int64_t q_stride;
    int q_width, q_threads;
    float eps;
    bool q_wide;
    kv_append::Arguments append;
    compress::Arguments compressions[2];
    int groups[2];
    int parts[PARTS];  // by blockIdx.y
};

template <bool INDEX>
__device__ __forceinline__ void take(const Arguments& a, float* shared) {
    const compress::Arguments& c = a.compressions[INDEX];
    constexpr int EACH = INDEX ? 1 : ITER;
    if (c.bytes > 0)
        compress::take<bf16, EACH, INDEX, true>(c, blockIdx.x, a.groups[INDEX], shared);
    else
        compress::take<bf16, EACH, INDEX, false>(c, blockIdx.x, a.groups[INDEX], shared);
}

__global__ void __launch_bounds__(MOST_THREADS) attn_inputs(const __grid_constant__ Arguments a) {
    extern __shared__ float shared[];
    take_turn();
    const int64_t row = blockIdx.x;
    const int part = a.parts[blockIdx.y];
    if (part == ENTRIES) {
        take<false>(a, shared);
    } else if (part == KEYS) {
        take<true>(a, shared);
    } else if (part == NORM) {
        norm_row(a.qr + row * a.q_stride, a.q_weight, a.normed + row * a.q_width, a.q_width, a.eps, a.q_wide, a.q_threads);
    } else if (threadIdx.x < 32) {
        if (a.append.bytes > 0)
            kv_append::append<bf16, ITER, true>(a.append, row);
        else
            kv_append::append<bf16, ITER, false>(a.append, row);
    }
}

}  // namespace

extern "C" int dsv4_attn_inputs(const void* qr, const float* q_weight, void* normed, int64_t q_rows, int64_t q_stride,
                                int q_width, float q_eps, KV_APPEND_PARAMETERS, COMPRESS_PARAMETERS(0),
                                COMPRESS_PARAMETERS(1), cudaStream_t stream) {
    if (q_rows == 0) return cudaSuccess;
    if (n > ITER * 256 || rows != q_rows || dtype != BF16) return cudaErrorInvalidValue;
    constexpr int WIDE = wide_elements<bf16>;
    Arguments a = {};
    a.qr = static_cast<const bf16*>(qr), a.q_weight = q_weight, a.normed = static_cast<bf16*>(normed);
    a.q_stride = q_stride, a.q_width = q_width, a.q_threads = norm_threads<bf16>(q_width), a.eps = q_eps;
    a.q_wide = q_width % WIDE == 0 && q_stride % WIDE == 0 && aligned16(qr) && aligned16(q_weight) && aligned16(normed);
    a.append = kv_append::arguments(KV_APPEND_VALUES);
    a.compressions[0] = compress::arguments(COMPRESS_VALUES(0));
    a.compressions[1] = compress::arguments(COMPRESS_VALUES(1));
    int parts = 0, threads = max(a.q_threads, 32);
    size_t shared = 0;
    for (int i = 0; i < 2; ++i) {
        const compress::Arguments& c = a.compressions[i];
        if (c.width == 0) continue;
        if (!c.from_state || c.tokens != q_rows || c.entries > q_rows) return cudaErrorInvalidValue;
        a.groups[i] = compress::groups_of(c);
        threads = max(threads, compress::threads_of(c));
        shared = max(shared, compress::shared_of(c));
        a.parts[parts++] = i == 0 ? ENTRIES : KEYS;
    }
    a.parts[parts++] = APPEND, a.parts[parts++] = NORM;
    return launch_dependent(attn_inputs, q_rows, parts, threads, shared, stream, a);
}
