// index_topk. Up to 64 rows: decode blocks take the queries as the projection leaves them, treat them (index_query.cuh)
// and score. Where no row can have more than TOGETHER entries, a row is a cluster's: each block sends its scores to all
// of them, then all find the same threshold and each writes its part of the selection, in one launch. Else scores go to
// memory, as sortable 16-bit keys, and a second launch selects, a block per row. More rows: queries come treated, scores
// are made for a slice of rows at a time, then selected from.
//
// Scores: heads are the rows of the products, entries the columns. Decode: a warp takes 16 entries at a time. Prefill: a
// warp keeps the keys of 32 entries in registers and meets them with the queries of 16 tokens, one after another, which
// arrive in shared memory one token ahead; so keys are read and decoded once for all of them.
//
// Selection: histograms of the keys find the threshold; what lies above it is written, and the first of what equals it,
// in the order of entries.
#include <dsv4/cluster.cuh>
#include <dsv4/dependent.cuh>
#include <dsv4/fragments.cuh>
#include <dsv4/index_key.cuh>
#include <dsv4/index_query.cuh>
#include <dsv4/index_select.cuh>
#include <dsv4/mma.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/reduce.cuh>

using namespace dsv4;

namespace {

using dsv4::index::PAGE;
using dsv4::index::THREADS;
using dsv4::index::TOGETHER;
using dsv4::index::WARPS;
using dsv4::index::WIDTH;

constexpr int ROW_BYTES = WIDTH * 2;
constexpr int TILE_ROWS = 16, TILES = 4;               // prefill: tokens of a block, and tiles of 8 entries of a warp
constexpr int BLOCKS = 264;                            // decode: two blocks for each multiprocessor of an H200
constexpr int ENTRIES = 16;                            // decode: of a warp at a time

struct Arguments {
    const uint8_t* q;   // [T, Hi, 128] BF16
    const float2* cis;  // [T, dims / 2]; null: queries are treated
    int64_t cis_stride;
    const void* weights;  // [T, Hi] BF16 or float32
    int64_t weight_stride;
    const uint8_t* keys;
    const int64_t *pages, *sequence, *visible;
    uint16_t* scores;  // [slice, 64 P]
    int64_t* out;      // [T, width]
    int64_t rows, first;  // of all, and the first of this slice
    int heads, dims, n_pages, sequences, topk, width, blocks;  // blocks: of a decode row
    float weight_scale;
    bool packed, f32_weights, quantize;
};

// Entries that row t has to choose from; 0: it takes all it sees, or is a padding row.
__device__ __forceinline__ int to_score(const Arguments& a, int64_t sequence, int64_t visible) {
    visible = sequence < 0 ? 0 : min(visible, static_cast<int64_t>(a.n_pages) * PAGE);
    return visible > a.topk ? static_cast<int>(visible) : 0;
}

__device__ __forceinline__ int64_t pool_row(const int64_t* pages, int e) { return pages[e / PAGE] * PAGE + e % PAGE; }

// The result of a row that takes all it sees: every `step`-th from `e` on.
__device__ __forceinline__ void take_all(const Arguments& a, int64_t t, int64_t sequence, int64_t visible, int e,
                                         int step) {
    const int64_t seen = sequence < 0 ? 0 : visible;
    for (; e < a.width; e += step)
        a.out[t * a.width + e] = e < seen ? pool_row(a.pages + sequence * a.n_pages, e) : -1;
}

// A head's weight as it lies in memory, and that rounded to BF16 before it is scaled and after.
__device__ __forceinline__ uint32_t weight_bits(const Arguments& a, int64_t t, int head) {
    if (head >= a.heads) return 0;
    const int64_t at = t * a.weight_stride + head;
    return a.f32_weights ? static_cast<const uint32_t*>(a.weights)[at] : static_cast<const uint16_t*>(a.weights)[at];
}
__device__ __forceinline__ bf16 weight_of(const Arguments& a, uint32_t bits) {
    const float w = a.f32_weights ? rounded<bf16>(__uint_as_float(bits)) : __uint_as_float(bits << 16);
    return from_float<bf16>(__fmul_rn(w, a.weight_scale));
}

// BF16 bits to a key that sorts like the value: -0 as 0, NaN above all; never 0.
__device__ __forceinline__ uint32_t sortable(float score) {
    const uint32_t bits = from_float<bf16>(score).bits;
    if ((bits & 0x7FFF) > 0x7F80) return 0xFFFF;
    if (bits == 0x8000) return 0x8000;
    return bits & 0x8000 ? ~bits & 0xFFFF : bits | 0x8000;
}

// Where chunk c (of 16 bytes) of a head's row lies. Lane (g, t) reads chunks 4 t .. 4 t + 3 of row g and writes, treated,
// chunks 2 g and 2 g + 1 of rows 2 t and 2 t + 1: lanes that are served together meet different banks in both. Rows that
// lie 8 apart have their chunks in the same places.
__device__ __forceinline__ int chunk_at(int row, int c) {
    return row * ROW_BYTES + (c ^ (c >> 3 & 1) ^ (row & 1) << 1 ^ (row >> 1 & 1) ^ (row >> 2 & 1) << 2) * 16;
}

// sum[n][j]: this lane's heads' share of the score of column 2 t + j of tile n.
template <int MT, int NT>
__device__ __forceinline__ void score_tiles(float (&sum)[NT][2], const uint8_t* heads, const bf16* weights,
                                            const uint32_t (&b)[NT][16], int g, int t) {
#pragma unroll
    for (int n = 0; n < NT; ++n) sum[n][0] = sum[n][1] = 0.0f;
#pragma unroll NT < TILES ? 2 : 1
    for (int mt = 0; mt < MT; ++mt) {
        float dot[NT][4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint8_t* at = heads + chunk_at(g, 4 * t + i) + mt * (16 * ROW_BYTES);
            const uint4 x = *reinterpret_cast<const uint4*>(at);
            const uint4 y = *reinterpret_cast<const uint4*>(at + 8 * ROW_BYTES);
            const uint32_t a0[4] = {x.x, y.x, x.y, y.y}, a1[4] = {x.z, y.z, x.w, y.w};
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                mma_bf16(dot[n], a0, b[n][4 * i], b[n][4 * i + 1]);
                mma_bf16(dot[n], a1, b[n][4 * i + 2], b[n][4 * i + 3]);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t share = weights[mt * 16 + h * 8 + g].bits * 0x10001u;  // twice
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const uint32_t both = mul_bf16x2(relu_bf16x2(dot[n][2 * h], dot[n][2 * h + 1]), share);
                sum[n][0] += __uint_as_float(both << 16);
                sum[n][1] += __uint_as_float(both & 0xFFFF0000u);
            }
        }
    }
}

// The sum of all heads' shares, in every lane of the column.
template <int NT>
__device__ __forceinline__ void add_heads(float (&sum)[NT][2]) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
            sum[n][0] += __shfl_xor_sync(0xffffffffu, sum[n][0], step);
            sum[n][1] += __shfl_xor_sync(0xffffffffu, sum[n][1], step);
        }
}

template <int MT, bool CLUSTER>
struct Decode {
    alignas(16) uint8_t heads[MT * 16 * ROW_BYTES];
    bf16 weights[MT * 16];
};
template <int MT>
struct Decode<MT, true> : Decode<MT, false> {
    index::Selection selection;
};

template <int MT, bool CLUSTER>
__global__ void __launch_bounds__(THREADS, 2) index_decode(const __grid_constant__ Arguments a) {
    __shared__ Decode<MT, CLUSTER> s;
    let_next_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int local = blockIdx.x / a.blocks, rank = blockIdx.x % a.blocks;
    const int64_t row = a.first + local;
    for (int i = a.heads * ROW_BYTES + 16 * threadIdx.x; i < MT * 16 * ROW_BYTES; i += 16 * THREADS)
        *reinterpret_cast<uint4*>(s.heads + i) = make_uint4(0, 0, 0, 0);  // heads that are not there
    if constexpr (CLUSTER) {
        index::clear(s.selection);
        cluster_barrier();  // all blocks run: their memory may be written
    }
    wait_for_previous();

    // All that no other load must precede; a row of a decode step is the sequence of the same number.
    const bool treats = warp * index::WARP_HEADS < a.heads;
    index::HeadShare share;
    if (treats)
        share = index::load_head(a.q + (row * a.heads + warp * index::WARP_HEADS + g) * ROW_BYTES,
                                 a.cis + row * a.cis_stride, a.dims, t);
    const uint32_t weight = threadIdx.x < MT * 16 ? weight_bits(a, row, threadIdx.x) : 0;
    const int first = warp * a.blocks + rank, stride = WARPS * a.blocks;  // in sixteens of entries
    const bool guess = row < a.sequences && first < a.n_pages * (PAGE / ENTRIES);
    int page = guess ? static_cast<int>(a.pages[row * a.n_pages + first / (PAGE / ENTRIES)]) : -1;
    const int64_t sequence = a.sequence[row], visible = a.visible[row];

    const int n = to_score(a, sequence, visible);
    if (n == 0) {
        if constexpr (CLUSTER) take_all(a, row, sequence, visible, rank * THREADS + threadIdx.x, a.blocks * THREADS);
        return;
    }
    if (!CLUSTER && rank * ENTRIES >= n) return;
    const int64_t* pages = a.pages + sequence * a.n_pages;
    const auto page_of = [&](int i) {
        return i * ENTRIES < n ? static_cast<int>(pages[i / (PAGE / ENTRIES)]) : -1;
    };
    if (sequence != row || first * ENTRIES >= n) page = page_of(first);
    int next_page = page_of(first + stride);
    // column c of tile m is entry 4 (c / 2) + 2 m + c % 2 of the sixteen: a lane's four scores are neighbours
    const auto key_at = [&](int i, int m, int bytes) {
        const int entry = i * ENTRIES % PAGE + g / 2 * 4 + m * 2 + g % 2;
        return a.keys + (static_cast<int64_t>(page) * PAGE + entry) * bytes;
    };
    index::PackedShare keys[2];
    const auto fetch = [&](int i) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
            keys[m] = a.packed && page >= 0 ? index::fetch_packed(key_at(i, m, index::PACKED_BYTES), t)
                                            : index::NO_KEY;
    };
    fetch(first);
    if (treats)
        index::treat_heads(share, a.quantize, lane, [&](int head, int chunk, uint4 channels) {
            *reinterpret_cast<uint4*>(s.heads + chunk_at(warp * index::WARP_HEADS + head, chunk)) = channels;
        });
    if (threadIdx.x < MT * 16) s.weights[threadIdx.x] = weight_of(a, weight);
    __syncthreads();

    uint32_t low = 0xFFFF, high = 0;
    for (int i = first; i * ENTRIES < n; i += stride) {
        uint32_t b[2][16];
#pragma unroll
        for (int m = 0; m < 2; ++m)
            if (a.packed || page < 0)
                index::unpack(b[m], keys[m]);
            else
                index::load_plain(b[m], key_at(i, m, index::PLAIN_BYTES), t);
        page = next_page;
        fetch(i + stride);
        next_page = page_of(i + 2 * stride);
        float sum[2][2];
        score_tiles<MT>(sum, s.heads, s.weights, b, g, t);
        add_heads(sum);
        uint64_t four = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint32_t key = sortable(sum[k / 2][k % 2]);
            if (i * ENTRIES + 4 * t + k >= n) continue;
            four |= static_cast<uint64_t>(key) << 16 * k;
            low = min(low, key), high = max(high, key);
        }
        const int at = i * (ENTRIES / 4) + t;
        if constexpr (CLUSTER) {
            if (g < a.blocks) put_peer_value(&s.selection.scores[at], g, four);  // lanes of a column, a block each
        } else if (g == 0) {
            reinterpret_cast<uint64_t*>(a.scores + static_cast<int64_t>(local) * a.n_pages * PAGE)[at] = four;
        }
    }
    if constexpr (CLUSTER) {
        low = __reduce_min_sync(0xffffffffu, low), high = __reduce_max_sync(0xffffffffu, high);
        const uint64_t span = static_cast<uint64_t>(high) << 32 | low;
        if (lane < a.blocks) put_peer_value(&s.selection.spans[rank * WARPS + warp], lane, span);
        cluster_barrier();
        index::select(s.selection, pages, a.out + row * a.width, n, a.topk, rank, a.blocks);
    }
}

template <int MT>
struct Queries {
    alignas(16) uint8_t heads[2][MT * 16 * ROW_BYTES];
    bf16 weights[TILE_ROWS][MT * 16];
    int seen[TILE_ROWS], sequence[TILE_ROWS];
};

template <int MT>
__global__ void __launch_bounds__(THREADS, 2) index_scores(const __grid_constant__ Arguments a) {
    constexpr int NT = TILES;
    __shared__ Queries<MT> s;
    take_turn();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int local = blockIdx.y * TILE_ROWS;  // of the slice
    const int64_t first = a.first + local;
    const int rows = static_cast<int>(min(a.rows - first, static_cast<int64_t>(TILE_ROWS)));
    if (threadIdx.x < rows) {
        const int64_t row = first + threadIdx.x, sequence = a.sequence[row];
        s.seen[threadIdx.x] = to_score(a, sequence, a.visible[row]);
        s.sequence[threadIdx.x] = static_cast<int>(sequence);
    }
    for (int i = threadIdx.x; i < rows * MT * 16; i += THREADS)
        s.weights[i / (MT * 16)][i % (MT * 16)] =
            weight_of(a, weight_bits(a, first + i / (MT * 16), i % (MT * 16)));
    for (int i = a.heads * ROW_BYTES + 16 * threadIdx.x; i < MT * 16 * ROW_BYTES; i += 16 * THREADS)
        for (int buffer = 0; buffer < 2; ++buffer)  // heads that are not there
            *reinterpret_cast<uint4*>(s.heads[buffer] + i) = make_uint4(0, 0, 0, 0);
    __syncthreads();
    int most = 0;
    for (int r = 0; r < rows; ++r) most = max(most, s.seen[r]);

    const auto fetch = [&](int r, int buffer) {
        const uint8_t* from = a.q + (first + r) * a.heads * ROW_BYTES;
        uint8_t* to = s.heads[buffer] + chunk_at(threadIdx.x / 16, threadIdx.x % 16);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)  // 16 heads by all threads
            if (mt * 16 + threadIdx.x / 16 < a.heads)
                copy_async16(to + mt * (16 * ROW_BYTES), from + mt * (16 * ROW_BYTES) + 16 * threadIdx.x);
    };
    const int entry = blockIdx.x * (WARPS * NT * 8), mine = entry + warp * (NT * 8);
    if (entry >= most) return;
    const auto next_row = [&](int r) {
        do ++r;
        while (r < rows && s.seen[r] <= entry);
        return r;
    };
    uint32_t b[NT][16];
    int held = -1, buffer = 0, r = next_row(-1);
    fetch(r, 0);
    copies_commit();
    while (r < rows) {
        const int next = next_row(r);
        if (next < rows) fetch(next, buffer ^ 1);
        copies_commit();
        if (s.sequence[r] != held) {
            held = s.sequence[r];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const int e = mine + n * 8 + g;
                const int64_t page = e < a.n_pages * PAGE ? a.pages[int64_t(held) * a.n_pages + e / PAGE] : -1;
                const int64_t row = page * PAGE + e % PAGE;
                if (page < 0 || a.packed)
                    index::unpack(b[n], page < 0 ? index::NO_KEY
                                                 : index::fetch_packed(a.keys + row * index::PACKED_BYTES, t));
                else
                    index::load_plain(b[n], a.keys + row * index::PLAIN_BYTES, t);
            }
        }
        copies_wait_but<1>();
        __syncthreads();
        float sum[NT][2];
        score_tiles<MT>(sum, s.heads[buffer], s.weights[r], b, g, t);
        add_heads(sum);
        float even = 0.0f, odd = 0.0f;  // lanes (n, t) store tile n
#pragma unroll
        for (int n = 0; n < NT; ++n)
            if (g == n) even = sum[n][0], odd = sum[n][1];
        const int e = mine + g * 8 + 2 * t;
        if (g < NT && e < a.n_pages * PAGE)
            *reinterpret_cast<uint32_t*>(a.scores + static_cast<int64_t>(local + r) * a.n_pages * PAGE + e) =
                sortable(even) | sortable(odd) << 16;
        r = next, buffer ^= 1;
        __syncthreads();  // nobody reads the other buffer any more
    }
}

constexpr int SELECT_THREADS = 1024, SELECT_WARPS = SELECT_THREADS / 32, EACH = 8;
constexpr int COARSE = 2048, FINE = 32;  // bins: the upper 11 bits of a key, then the lower 5
constexpr int CACHED_BYTES = 80 * 1024;  // keys kept in shared memory between passes, where they fit

// The sum over the threads before this one, and over all. Two barriers.
__device__ __forceinline__ uint32_t exclusive_sum(uint32_t x, uint32_t (&warps)[SELECT_WARPS], uint32_t& all) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t sum = sum_up_to(x);
    __syncthreads();  // the last call's readers are done
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    const uint32_t totals = sum_up_to(warps[lane]);
    all = __shfl_sync(0xffffffffu, totals, 31);
    const uint32_t before = __shfl_sync(0xffffffffu, totals, warp ? warp - 1 : 0);
    return sum - x + (warp ? before : 0);
}

struct Keys8 {
    uint4 words;
    __device__ uint32_t operator[](int i) const {
        const uint32_t word = i < 4 ? (i < 2 ? words.x : words.y) : (i < 6 ? words.z : words.w);
        return i % 2 ? word >> 16 : word & 0xFFFF;
    }
};

__global__ void __launch_bounds__(SELECT_THREADS, 1) index_select(const __grid_constant__ Arguments a, int cached) {
    extern __shared__ __align__(16) uint8_t cache[];
    __shared__ uint32_t coarse[COARSE], fine[FINE], warps[SELECT_WARPS];
    __shared__ uint32_t edge_bin, edge_left, edge_key;
    take_turn();
    const int64_t t = a.first + blockIdx.x, sequence = a.sequence[t];
    const int64_t* pages = a.pages + sequence * a.n_pages;
    int64_t* out = a.out + t * a.width;
    const int n = to_score(a, sequence, a.visible[t]);
    if (n == 0) {
        take_all(a, t, sequence, a.visible[t], threadIdx.x, SELECT_THREADS);
        return;
    }
    const uint4* scores = reinterpret_cast<const uint4*>(a.scores + static_cast<int64_t>(blockIdx.x) * a.n_pages * PAGE);
    const int groups = (n + EACH - 1) / EACH;
    const bool keep = groups * 16 <= cached;
    uint4* kept = reinterpret_cast<uint4*>(cache);
    const uint4* from = keep ? kept : scores;

    for (int i = threadIdx.x; i < COARSE; i += SELECT_THREADS) coarse[i] = 0;
    if (threadIdx.x < FINE) fine[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < groups; i += SELECT_THREADS) {
        const Keys8 keys{scores[i]};
        if (keep) kept[i] = keys.words;
#pragma unroll
        for (int k = 0; k < EACH; ++k)
            if (i * EACH + k < n) atomicAdd(&coarse[keys[k] / FINE], 1u);
    }
    __syncthreads();

    const uint32_t topk = a.topk;
    uint32_t all;
    {
        const int bin = COARSE - 1 - 2 * threadIdx.x;  // from the top: this thread's bins are `bin` and the one below
        const uint32_t upper = coarse[bin], lower = coarse[bin - 1];
        const uint32_t above = exclusive_sum(upper + lower, warps, all);
        if (above < topk && topk <= above + upper) edge_bin = bin, edge_left = topk - above;
        if (above + upper < topk && topk <= above + upper + lower) edge_bin = bin - 1, edge_left = topk - above - upper;
    }
    __syncthreads();
    const uint32_t bin = edge_bin, left = edge_left;
    for (int i = threadIdx.x; i < groups; i += SELECT_THREADS) {
        const Keys8 keys{from[i]};
#pragma unroll
        for (int k = 0; k < EACH; ++k)
            if (i * EACH + k < n && keys[k] / FINE == bin) atomicAdd(&fine[keys[k] % FINE], 1u);
    }
    __syncthreads();
    if (threadIdx.x < FINE) {  // a lane per code, from the top
        const int code = FINE - 1 - threadIdx.x;
        const uint32_t own = fine[code], sum = sum_up_to(own);
        if (sum >= left && sum - own < left) edge_key = bin * FINE + code, edge_left = left - (sum - own);
    }
    __syncthreads();
    const uint32_t edge = edge_key, equals = edge_left;  // all keys above the edge, and this many that equal it

    uint32_t higher = 0, same = 0;  // before this round
    for (int base = 0; base < groups; base += SELECT_THREADS) {
        const int i = base + threadIdx.x;
        const Keys8 keys{i < groups ? from[i] : make_uint4(0, 0, 0, 0)};
        uint32_t count = 0;  // above the edge | equal to it << 16
#pragma unroll
        for (int k = 0; k < EACH; ++k)
            if (i * EACH + k < n) count += keys[k] > edge ? 1u : keys[k] == edge ? 0x10000u : 0u;
        const uint32_t before = exclusive_sum(count, warps, all);
        uint32_t h = higher + (before & 0xFFFF), e = same + (before >> 16);
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
            const int entry = i * EACH + k;
            if (entry >= n || keys[k] < edge) continue;
            if (keys[k] > edge)
                out[h++ + min(e, equals)] = pool_row(pages, entry);
            else if (e++ < equals)
                out[h + e - 1] = pool_row(pages, entry);
        }
        higher += all & 0xFFFF, same += all >> 16;
    }
}

template <int MT>
static cudaError_t decode(Arguments& a, int64_t rows, bool together, cudaStream_t stream) {
    if (together) {
        a.blocks = rows <= 16 ? 8 : rows <= 32 ? 4 : 2;
        return launch_dependent_clusters(index_decode<MT, true>, rows * a.blocks, THREADS, 0, a.blocks, stream, a);
    }
    const int all = (a.n_pages * PAGE / ENTRIES + WARPS - 1) / WARPS, most = static_cast<int>((BLOCKS + rows - 1) / rows);
    a.blocks = all < most ? all : most;
    return launch_dependent(index_decode<MT, false>, rows * a.blocks, 1, THREADS, 0, stream, a);
}

template <int MT>
static cudaError_t score(Arguments& a, int64_t rows, bool together, cudaStream_t stream) {
    if (a.cis != nullptr) return decode<MT>(a, rows, together, stream);
    const int each = WARPS * TILES * 8, tiles = static_cast<int>((rows + TILE_ROWS - 1) / TILE_ROWS);
    return launch_dependent(index_scores<MT>, (a.n_pages * PAGE + each - 1) / each, tiles, THREADS, 0, stream, a);
}

}  // namespace

extern "C" int dsv4_index_topk(const void* q, const void* cis, const void* weights, const void* keys, const void* pages,
                               const void* sequence, const void* visible, void* scores, void* out, int64_t rows,
                               int64_t cis_stride, int64_t weight_stride, int64_t slice, int heads, int dims,
                               int n_pages, int sequences, int topk, int width, int packed, int weight_dtype,
                               int quantize, float weight_scale, cudaStream_t stream) {
    if (rows == 0 || width == 0) return cudaSuccess;
    if (!aligned16(q) || !aligned16(keys) || !aligned16(scores)) return cudaErrorMisalignedAddress;
    Arguments a = {};
    a.q = static_cast<const uint8_t*>(q), a.cis = static_cast<const float2*>(cis), a.cis_stride = cis_stride;
    a.weights = weights, a.weight_stride = weight_stride;
    a.f32_weights = weight_dtype == F32, a.weight_scale = weight_scale;
    a.keys = static_cast<const uint8_t*>(keys);
    a.pages = static_cast<const int64_t*>(pages), a.sequence = static_cast<const int64_t*>(sequence);
    a.visible = static_cast<const int64_t*>(visible), a.scores = static_cast<uint16_t*>(scores);
    a.out = static_cast<int64_t*>(out), a.heads = heads, a.dims = dims, a.n_pages = n_pages, a.sequences = sequences;
    a.topk = topk, a.width = width, a.packed = packed != 0, a.quantize = quantize != 0;
    const bool scored = topk < n_pages * PAGE, together = scored && cis != nullptr && n_pages * PAGE <= TOGETHER;
    const int bytes = n_pages * PAGE * 2 < CACHED_BYTES ? n_pages * PAGE * 2 : CACHED_BYTES;
    if (const cudaError_t error =
            cudaFuncSetAttribute(index_select, cudaFuncAttributeMaxDynamicSharedMemorySize, CACHED_BYTES))
        return error;
    for (a.first = 0; a.first < rows; a.first += slice) {
        const int64_t here = rows - a.first < slice ? rows - a.first : slice;
        a.rows = a.first + here;
        if (scored) {
            const cudaError_t error =
                heads <= 16 ? score<1>(a, here, together, stream) : score<4>(a, here, together, stream);
            if (error) return error;
        }
        if (together) continue;
        const cudaError_t error = launch_dependent(index_select, here, 1, SELECT_THREADS, bytes, stream, a, bytes);
        if (error) return error;
    }
    return cudaSuccess;
}
