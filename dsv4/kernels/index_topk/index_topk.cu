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
#include <dsv4/index_score.cuh>
#include <dsv4/index_select.cuh>
#include <dsv4/reduce.cuh>

using namespace dsv4;

namespace {

using dsv4::index::PAGE;
using dsv4::index::ROW_BYTES;
using dsv4::index::TOGETHER;

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TILE_ROWS = 16, TILES = 4;               // prefill: tokens of a block, and tiles of 8 entries of a warp
constexpr int BLOCKS = 264;                            // decode: two blocks for each multiprocessor of an H200

using dsv4::index::Arguments;

template <int MT, bool CLUSTER>
struct Decode : index::Heads<MT> {};
template <int MT>
struct Decode<MT, true> : index::Heads<MT> {
    index::Selection<THREADS> selection;
    uint64_t scores[TOGETHER / 4];  // keys by fours
};

template <int MT, bool CLUSTER>
__global__ void __launch_bounds__(THREADS, 2) index_decode(const __grid_constant__ Arguments a) {
    __shared__ Decode<MT, CLUSTER> s;
    let_next_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int local = blockIdx.x / a.blocks, rank = blockIdx.x % a.blocks;
    const int64_t row = a.first + local;
    index::clear_heads<MT>(a, s);
    if constexpr (CLUSTER) {
        index::clear(s.selection);
        cluster_barrier();  // all blocks run: their memory may be written
    }
    wait_for_previous();
    index::start_turns<MT>(a, s, row);
    index::start_heads<MT>(a, s, row);
    const index::Tiles tiles = index::find_tiles<WARPS>(a, row, rank, warp);
    if (tiles.n == 0) {
        if constexpr (CLUSTER) index::take_all(a, row, rank * THREADS + threadIdx.x, a.blocks * THREADS);
        return;
    }
    index::score_row<MT, WARPS>(a, s, row, rank, warp, tiles, [&](int at, uint64_t four) {
        if constexpr (CLUSTER) {
            if (g < a.blocks) put_peer_value(&s.scores[at], g, four);  // lanes of a column, a block each
        } else if (g == 0) {
            reinterpret_cast<uint64_t*>(a.scores + static_cast<int64_t>(local) * a.n_pages * PAGE)[at] = four;
        }
    });
    if constexpr (CLUSTER) {
        const index::Share<THREADS> share(index::pages_of(a, row), tiles.n, rank, a.blocks, s.scores);
        cluster_barrier();
        index::select(s.selection, share, a.out + row * a.width, a.topk);
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
        s.seen[threadIdx.x] = index::to_score(a, sequence, a.visible[row]);
        s.sequence[threadIdx.x] = static_cast<int>(sequence);
    }
    for (int i = threadIdx.x; i < rows * MT * 16; i += THREADS)
        s.weights[i / (MT * 16)][i % (MT * 16)] =
            index::weight_of(a, index::weight_bits(a, first + i / (MT * 16), i % (MT * 16)));
    for (int i = a.heads * ROW_BYTES + 16 * threadIdx.x; i < MT * 16 * ROW_BYTES; i += 16 * THREADS)
        for (int buffer = 0; buffer < 2; ++buffer)  // heads that are not there
            *reinterpret_cast<uint4*>(s.heads[buffer] + i) = make_uint4(0, 0, 0, 0);
    __syncthreads();
    int most = 0;
    for (int r = 0; r < rows; ++r) most = max(most, s.seen[r]);

    const auto fetch = [&](int r, int buffer) {
        const uint8_t* from = a.q + (first + r) * a.heads * ROW_BYTES;
        uint8_t* to = s.heads[buffer] + index::chunk_at(threadIdx.x / 16, threadIdx.x % 16);
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
        index::score_tiles<MT>(sum, s.heads[buffer], s.weights[r], b, g, t);
        index::add_heads(sum);
        float even = 0.0f, odd = 0.0f;  // lanes (n, t) store tile n
#pragma unroll
        for (int n = 0; n < NT; ++n)
            if (g == n) even = sum[n][0], odd = sum[n][1];
        const int e = mine + g * 8 + 2 * t;
        if (g < NT && e < a.n_pages * PAGE)
            *reinterpret_cast<uint32_t*>(a.scores + static_cast<int64_t>(local + r) * a.n_pages * PAGE + e) =
                index::sortable(even) | index::sortable(odd) << 16;
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
    const int n = index::to_score(a, sequence, a.visible[t]);
    if (n == 0) {
        index::take_all(a, t, threadIdx.x, SELECT_THREADS);
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
                out[h++ + min(e, equals)] = index::pool_row(pages, entry);
            else if (e++ < equals)
                out[h + e - 1] = index::pool_row(pages, entry);
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
    const int all = (a.n_pages * PAGE / index::ENTRIES + WARPS - 1) / WARPS, most = static_cast<int>((BLOCKS + rows - 1) / rows);
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

extern "C" int dsv4_index_topk(INDEX_PARAMETERS, cudaStream_t stream) {
    if (rows == 0 || width == 0) return cudaSuccess;
    Arguments a;
    if (const cudaError_t error = index::arguments(a, INDEX_VALUES)) return error;
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
