// sparse_attention: HG heads of a token against its entries, on tensor cores.
//
// A call of up to 64 rows is attention_cluster.cuh or attention_parts.cuh. Above, a block has all the entries of its heads
// and walks its tiles in stages of TILES: packed bytes are copied to shared memory while the stage before is worked on,
// then decoded once to BF16, and serve as keys (q . entry) and as values (p . entries). The softmax is online, with a
// running maximum that moves once per stage. A stage without entries is skipped.
//
// Neither order nor stages depend on the widths of the row lists, on HG or on the other rows: a row's bits are the same
// in every such call.
#include <dsv4/attention.cuh>
#include <dsv4/attention_cluster.cuh>
#include <dsv4/attention_parts.cuh>
#include <dsv4/dependent.cuh>
#include <dsv4/mma.cuh>

using namespace dsv4;
using namespace dsv4::attention;

namespace dsv4::attention::few {

template <int TILES>
static cudaError_t run_cluster(Arguments a, int64_t rows, cudaStream_t stream) {
    constexpr int bytes = sizeof(typename Cluster<TILES>::S), HG = Cluster<TILES>::HG;
    const auto kernel = sparse_attention_cluster<TILES>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error) return error;
    a.groups = (a.heads + HG - 1) / HG;
    return launch_dependent_clusters(kernel, rows * a.groups * SPLITS, THREADS, bytes, SPLITS, stream, a);
}

// Chunks for which the row lists have room.
template <int TILES>
static int chunks_of(const Arguments& a) {
    return longer<TILES>(a) ? CHUNKS : 1;
}

// scratch: for sums and what was seen of every unit, room for heads in multiples of 32.
template <int HG, int TILES>
static cudaError_t run_parts(Arguments a, int rows, float* scratch, int processors, cudaStream_t stream) {
    constexpr int bytes = sizeof(WalkShared<HG, TILES>);
    const auto kernel = sparse_attention_parts<HG, TILES>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error) return error;
    a.groups = (a.heads + HG - 1) / HG;
    Parts parts = {};
    parts.chunks = chunks_of<TILES>(a);
    parts.units = rows * a.groups * SPLITS * parts.chunks;
    parts.sums = scratch;
    parts.seen = reinterpret_cast<float2*>(scratch + static_cast<int64_t>(parts.units) * HG * DH);
    const int each = (parts.units + processors - 1) / processors, blocks = (parts.units + each - 1) / each;
    if (const cudaError_t failed = launch_dependent(kernel, blocks, 1, THREADS, bytes, stream, a, parts, each))
        return failed;
    constexpr int HEADS = MERGE_THREADS / (DH / 4);
    const int heads = rows * a.heads;
    return launch_dependent(sparse_attention_merge<HG>, (heads + HEADS - 1) / HEADS, 1, MERGE_THREADS, 0, stream, a,
                            parts, heads);
}

// Without scratch, a cluster for 16 heads of a row. With it, parts: of 32 heads where those keep processors busy.
static cudaError_t run(const Arguments& a, int rows, float* scratch, bool roomy, int processors, cudaStream_t stream) {
    if (scratch == nullptr) return roomy ? run_cluster<5>(a, rows, stream) : run_cluster<2>(a, rows, stream);
    if (!roomy) return run_parts<16, 2>(a, rows, scratch, processors, stream);
    const int units = rows * ((a.heads + 31) / 32) * SPLITS * chunks_of<5>(a);
    if (a.heads <= 16 || 2 * units <= processors) return run_parts<16, 5>(a, rows, scratch, processors, stream);
    return run_parts<32, 5>(a, rows, scratch, processors, stream);
}

}  // namespace dsv4::attention::few

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

template <int HG, int TILES>
struct Shared {
    static constexpr int STAGE = TILES * TILE, SCORE_ROW = STAGE + 4;  // floats; probabilities take their place as BF16
    static constexpr int PARTS = 64 / HG;                              // partial dot products, by quarters of the channels
    alignas(16) uint8_t entries[STAGE * ROW];
    alignas(16) uint8_t q[HG * ROW];
    alignas(16) float scores[PARTS][HG][SCORE_ROW];
    alignas(16) uint8_t packed[STAGE * kv::ENTRY_BYTES];
    int rows[2][STAGE];
    int last[WARPS];
    float top[HG], total[HG], fade[HG];
};

// One token's tiles.
template <int HG, int TILES>
struct Block {
    using S = Shared<HG, TILES>;
    static constexpr int STAGE = S::STAGE, MT = HG / 16;

    const Arguments& a;
    S& s;
    const int64_t token;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int stages = 0;
    float sums[MT][8][4] = {};  // of the warp's 64 channels

    __device__ bool is_local(int stage, int tile) const { return (stage * TILES + tile) * TILE < a.local_positions; }
    __device__ const Source& source(int stage, int tile) const { return is_local(stage, tile) ? a.local : a.pool; }

    // The row number at slot 0 .. STAGE-1 of a stage, -1 for none.
    __device__ int row_at(int stage, int slot) const {
        return a.row_at(token, stage * STAGE + slot);
    }

    // Rows of stage 0, and how many stages there are up to the last entry.
    __device__ void scan() {
        const int tiles = (a.positions() + TILE - 1) / TILE;
        const int slots = (tiles + TILES - 1) / TILES * STAGE;
        int last = -1;
#pragma unroll 4
        for (int i = threadIdx.x; i < slots; i += THREADS) {
            const int row = row_at(i / STAGE, i % STAGE);
            if (i < STAGE) s.rows[0][i] = row;
            if (row >= 0) last = i;
        }
        last = __reduce_max_sync(0xffffffffu, last);
        if (lane == 0) s.last[warp] = last;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < WARPS; ++w) last = max(last, s.last[w]);
        stages = last < 0 ? 0 : last / STAGE + 1;
    }

    // Tiles of a stage up to the last one with an entry.
    __device__ int used_tiles(const int* rows) const {
        int used = 0;
#pragma unroll
        for (int base = 0; base < STAGE; base += 32) {
            const int slot = base + lane;
            const unsigned there = __ballot_sync(0xffffffffu, slot < STAGE && rows[slot] >= 0);
            if (there) used = (base + 31 - __clz(there)) / TILE + 1;
        }
        return used;
    }

    // Starts the copies of a stage's packed entries; a warp takes an entry at a time.
    __device__ void fetch(int stage, const int* rows) {
        for (int slot = warp; slot < STAGE; slot += WARPS) {
            const int row = rows[slot];
            const Source& from = source(stage, slot / TILE);
            if (row < 0 || !from.packed) continue;
            const uint8_t* entry = from.data + static_cast<int64_t>(row) * kv::ENTRY_BYTES;
            for (int i = lane; i < kv::ENTRY_BYTES / 8; i += 32)
                copy_async8(s.packed + slot * kv::ENTRY_BYTES + 8 * i, entry + 8 * i);
        }
    }

    // BF16 entries of a stage's used tiles, zeros where there is none: 0 x NaN must not reach a sum.
    __device__ void decode(int stage, const int* rows, int used) {
        for (int slot = warp; slot < used * TILE; slot += WARPS) {
            const int row = rows[slot];
            const Source& from = source(stage, slot / TILE);
            uint8_t* to = s.entries + slot * ROW;
#pragma unroll
            for (int i = lane; i < DH / 8; i += 32) {
                uint4* channels = reinterpret_cast<uint4*>(to) + i;
                if (row < 0)
                    *channels = make_uint4(0, 0, 0, 0);
                else if (from.packed)
                    *channels = kv::channels8(s.packed + slot * kv::ENTRY_BYTES, i);
                else
                    copy_async16(channels, from.data + static_cast<int64_t>(row) * (DH * 2) + 16 * i);
            }
        }
    }

    // dot[j] = 16 heads x 8 entries of tile 2 j + half, over the channels of one quarter.
    __device__ void dots(float (&dot)[TILES][4], int quarter, int mt, int half, int used) const {
#pragma unroll
        for (int j = 0; j < TILES; ++j) dot[j][0] = dot[j][1] = dot[j][2] = dot[j][3] = 0.0f;
        const uint8_t* heads = s.q + (mt * 16 + lane % 16) * ROW + lane / 16 * 16 + quarter * (DH / 2);
        const uint8_t* keys = s.entries + (half * 8 + lane % 8) * ROW + lane / 8 * 16 + quarter * (DH / 2);
#pragma unroll
        for (int k = 0; k < DH / 2; k += 64) {  // bytes: two products of 16 channels
            uint32_t a0[4], a1[4];
            load_matrices(a0, heads + k);
            load_matrices(a1, heads + k + 32);
#pragma unroll
            for (int j = 0; j < TILES; ++j)
                if (j < used) {
                    uint32_t b[4];
                    load_matrices(b, keys + j * (16 * ROW) + k);
                    mma_bf16(dot[j], a0, b[0], b[1]);
                    mma_bf16(dot[j], a1, b[2], b[3]);
                }
        }
    }

    __device__ void put_dots(const float (&dot)[TILES][4], int part, int mt, int half, int used) {
        const int g = lane / 4, column = half * 8 + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < TILES; ++j)
            if (j < used) {
                *reinterpret_cast<float2*>(&s.scores[part][mt * 16 + g][j * 16 + column]) =
                    make_float2(dot[j][0], dot[j][1]);
                *reinterpret_cast<float2*>(&s.scores[part][mt * 16 + g + 8][j * 16 + column]) =
                    make_float2(dot[j][2], dot[j][3]);
            }
    }

    // q . entry, summed by quarters of the channels: (0 + 1) + (2 + 3).
    __device__ void score(int used) {
        if constexpr (HG == 16) {
            float dot[TILES][4];
            dots(dot, warp % 4, 0, warp / 4, used);
            put_dots(dot, warp % 4, 0, warp / 4, used);
        } else if constexpr (HG == 32) {
            const int both = warp / 4, mt = warp / 2 % 2, half = warp % 2;
            float dot[TILES][4], pair[TILES][4];
            dots(pair, 2 * both, mt, half, used);
            dots(dot, 2 * both + 1, mt, half, used);
#pragma unroll
            for (int j = 0; j < TILES; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) pair[j][i] += dot[j][i];
            put_dots(pair, both, mt, half, used);
        } else {
            static_assert(HG == 64, "four warps of 16 heads, twice");
            float sum[TILES][4], pair[TILES][4];
#pragma unroll
            for (int both = 0; both < 2; ++both) {
                float dot[TILES][4];
                dots(pair, 2 * both, warp % 4, warp / 4, used);
                dots(dot, 2 * both + 1, warp % 4, warp / 4, used);
#pragma unroll
                for (int j = 0; j < TILES; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        pair[j][i] += dot[j][i];
                        sum[j][i] = both ? sum[j][i] + pair[j][i] : pair[j][i];
                    }
            }
            put_dots(sum, 0, warp % 4, warp / 4, used);
        }
    }

    __device__ float score_of(int head, int slot) const {
        if constexpr (S::PARTS == 1) return s.scores[0][head][slot];
        if constexpr (S::PARTS == 2) return s.scores[0][head][slot] + s.scores[1][head][slot];
        return (s.scores[0][head][slot] + s.scores[1][head][slot]) +
               (s.scores[2 % S::PARTS][head][slot] + s.scores[3 % S::PARTS][head][slot]);
    }

    // Probabilities relative to the running maximum, rounded to BF16 over their scores; a warp per head.
    __device__ void softmax(const int* rows, int used) {
        constexpr int COLUMNS = (STAGE + 31) / 32;
        for (int head = warp; head < HG; head += WARPS) {
            float x[COLUMNS], sum = 0.0f;
            const float before = s.top[head];
            float top = before;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const int slot = c * 32 + lane;
                const bool there = slot < STAGE && rows[slot] >= 0;
                x[c] = there ? __fmul_rn(score_of(head, slot), a.scale) : -INFINITY;
                top = fmaxf(top, x[c]);
            }
#pragma unroll
            for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
            __syncwarp();
            bf16* p = reinterpret_cast<bf16*>(s.scores[0][head]);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const int slot = c * 32 + lane;
                const float probability = expf(x[c] - top);
                sum += probability;
                if (slot < used * TILE) p[slot] = from_float<bf16>(probability);
            }
            sum = warp_sum(sum);
            if (lane == 0) {
                const float fade = expf(before - top);
                s.total[head] = fmaf(s.total[head], fade, sum);
                s.top[head] = top, s.fade[head] = fade;
            }
        }
    }

    // sums = sums * fade + p . entries
    __device__ void accumulate(int used) {
        const int g = lane / 4;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            const float upper = s.fade[mt * 16 + g], lower = s.fade[mt * 16 + g + 8];
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                sums[mt][n][0] *= upper, sums[mt][n][1] *= upper;
                sums[mt][n][2] *= lower, sums[mt][n][3] *= lower;
            }
        }
        const uint8_t* values = s.entries + lane % 16 * ROW + warp * 128 + lane / 16 * 16;
        for (int tile = 0; tile < used; ++tile) {
            uint32_t p[MT][4];
#pragma unroll
            for (int mt = 0; mt < MT; ++mt)
                load_matrices(p[mt], reinterpret_cast<const uint8_t*>(s.scores[0][mt * 16 + lane % 16]) + tile * 32 +
                                         lane / 16 * 16);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                uint32_t b[4];
                load_transposed(b, values + tile * (TILE * ROW) + n * 32);
#pragma unroll
                for (int mt = 0; mt < MT; ++mt) {
                    mma_bf16(sums[mt][2 * n], p[mt], b[0], b[1]);
                    mma_bf16(sums[mt][2 * n + 1], p[mt], b[2], b[3]);
                }
            }
        }
    }

    __device__ void load_two(Query (&q)[2], int head, int pair) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) load_query(q[i], a, token, head + warp + (2 * pair + i) * WARPS, lane);
    }

    __device__ void run(int head) {
        Query q[2];
        float2 turns[4];
        load_two(q, head, 0);
        if (a.turn != nullptr) load_turns(turns, a, token, lane);
        for (int i = threadIdx.x; i < HG; i += THREADS) s.top[i] = LOWEST, s.total[i] = 0.0f;
        scan();  // ends behind a barrier
        fetch(0, s.rows[0]);
#pragma unroll
        for (int pair = 0; pair < HG / WARPS / 2; ++pair) {  // while entries arrive
            if (pair > 0) load_two(q, head, pair);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (a.turn != nullptr) norm_rope(q[i], turns, a, lane);
                put_query(s.q + (warp + (2 * pair + i) * WARPS) * ROW, q[i], lane);
            }
        }
        for (int stage = 0; stage < stages; ++stage) {
            const int* rows = s.rows[stage % 2];
            const int used = used_tiles(rows);
            const bool more = stage + 1 < stages;
            const int next = more && threadIdx.x < STAGE ? row_at(stage + 1, threadIdx.x) : -1;
            copies_wait();
            __syncthreads();  // packed bytes are here, and the last stage's entries are no longer read
            decode(stage, rows, used);
            if (more && threadIdx.x < STAGE) s.rows[(stage + 1) % 2][threadIdx.x] = next;
            copies_wait();
            __syncthreads();  // entries are here, and packed bytes are no longer read
            if (more) fetch(stage + 1, s.rows[(stage + 1) % 2]);
            if (!used) continue;
            score(used);
            __syncthreads();
            softmax(rows, used);
            __syncthreads();
            accumulate(used);
        }
        copies_wait();
        __syncthreads();
    }

    __device__ void finish(int head) {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {
                const int row = mt * 16 + lower * 8 + g;
                if (head + row >= a.heads) continue;
                const float total = s.total[row] + expf(a.sink[head + row] - s.top[row]);
                bf16* to = a.out + (token * a.heads + head + row) * DH;
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    const int channel = warp * 64 + n * 8 + 2 * t;
                    *reinterpret_cast<uint32_t*>(to + channel) =
                        result(sums[mt][n][2 * lower] / total, sums[mt][n][2 * lower + 1] / total,
                               turn_back(a, token, channel), channel >= DH - a.rope);
                }
            }
    }

};

template <int HG, int TILES>
__global__ void __launch_bounds__(THREADS, 1) sparse_attention(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) uint8_t memory[];
    take_turn();
    const int64_t unit = blockIdx.x;
    const int head = static_cast<int>(unit % a.groups) * HG;
    Block<HG, TILES> block{a, *reinterpret_cast<Shared<HG, TILES>*>(memory), unit / a.groups};
    block.run(head);
    block.finish(head);
}

template <int HG, int TILES>
static cudaError_t run(Arguments a, int64_t rows, cudaStream_t stream) {
    constexpr int bytes = sizeof(Shared<HG, TILES>);
    const auto kernel = sparse_attention<HG, TILES>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error) return error;
    a.groups = (a.heads + HG - 1) / HG;
    return launch_dependent(kernel, rows * a.groups, 1, THREADS, bytes, stream, a);
}

}  // namespace

extern "C" int dsv4_sparse_attention(const void* q, const void* local, const void* local_rows, const void* pool,
                                     const void* pool_rows, const void* sink, const void* cis, const void* turn,
                                     void* out, void* scratch, int64_t rows, int64_t turn_stride, int64_t local_stride,
                                     int64_t pool_stride, int64_t cis_stride, int heads, int local_width,
                                     int pool_width, int local_packed, int pool_packed, int rope, int split,
                                     float scale, float eps, cudaStream_t stream) {
    if (rows == 0 || heads == 0) return cudaSuccess;
    Arguments a;
    if (const cudaError_t error = describe(&a, q, local, local_rows, pool, pool_rows, sink, cis, turn, out, turn_stride,
                                           local_stride, pool_stride, cis_stride, heads, local_width, pool_width,
                                           local_packed, pool_packed, rope, scale, eps))
        return error;
    int device = 0, shared = 0, processors = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
        return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
    const bool roomy = shared >= static_cast<int>(sizeof(Shared<64, 5>));
    if (split) return few::run(a, static_cast<int>(rows), static_cast<float*>(scratch), roomy, processors, stream);
    if (!roomy) return run<16, 2>(a, rows, stream);
    if (a.heads % 32) return run<16, 5>(a, rows, stream);
    return a.heads % 64 ? run<32, 5>(a, rows, stream) : run<64, 5>(a, rows, stream);
}
