// index_topk. Of few rows decode blocks take the queries as the projection leaves them, treat them (index_query.cuh) and
// score. Up to 128 rows that cannot have more than TOGETHER entries: a row is a cluster's, each block sends its scores to
// all of them, then all find the same threshold and each writes its part of the selection, in one launch. Up to 64 rows
// that can: scores go to memory, as sortable 16-bit keys, and a second launch selects, a cluster of blocks per row, each of
// a range. More rows: queries come treated, scores are made for a slice of rows at a time, then selected from.
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
    index::score_row<MT, WARPS>(a, s, row, index::pages_of(a, row), rank, warp, tiles, [&](int at, uint64_t four) {
        if constexpr (CLUSTER) {
            if (g < a.blocks) put_peer_value(&s.scores[at], g, four);  // lanes of a column, a block each
        } else if (g == 0) {
            reinterpret_cast<uint64_t*>(a.scores + static_cast<int64_t>(local) * a.n_pages * PAGE)[at] = four;
        }
    });
    if constexpr (CLUSTER) {
        const index::Share<THREADS> share(index::pages_of(a, row), tiles.n, rank, a.blocks, s.scores);
        cluster_barrier();
        index::count_digit(s.selection.bins + index::BINS, share, index::DIGIT_BITS, 0);
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

constexpr int SELECT_THREADS = 512, EACH = 8, SELECT_PAGES = 16;  // keys loaded at a time; pages that are worth a block

struct Select {
    index::Selection<SELECT_THREADS> selection;  // bins: of this block's keys
    index::Counts counts[2];
};

// This block's keys come to shared memory, and their upper digits are counted.
__device__ __forceinline__ void keep(uint4* kept, const uint4* from, int count, uint32_t* bins) {
#pragma unroll 4
    for (int i = threadIdx.x; i < (count + EACH - 1) / EACH; i += SELECT_THREADS) {
        const uint4 keys = from[i];
        uint32_t pairs[EACH / 2] = {keys.x, keys.y, keys.z, keys.w};
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
            const uint32_t key = pairs[k / 2] >> k % 2 * 16 & 0xFFFF;
            if (i * EACH + k < count) atomicAdd(&bins[key >> index::DIGIT_BITS], 1u);
            else pairs[k / 2] &= k % 2 ? 0xFFFF : 0;  // not there
        }
        kept[i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

// A row is a cluster's; each block has a range of its keys, and reads what the others have counted.
__global__ void __launch_bounds__(SELECT_THREADS, 2) index_select(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) uint8_t kept[];
    __shared__ Select s;
    index::clear(s.selection);
    __syncthreads();
    take_turn();
    const int rank = blockIdx.x % a.blocks;
    const int64_t local = blockIdx.x / a.blocks, t = a.first + local;
    const int n = index::to_score(a, a.sequence[t], a.visible[t]);
    if (n == 0) {
        index::take_all(a, t, rank * SELECT_THREADS + threadIdx.x, a.blocks * SELECT_THREADS);
        return;
    }
    const index::Range range(n, rank, a.blocks, 1);
    const uint16_t* scores = a.scores + local * a.n_pages * PAGE + range.first;
    keep(reinterpret_cast<uint4*>(kept), reinterpret_cast<const uint4*>(scores), range.count,
         s.selection.bins + index::BINS);
    const index::Share<SELECT_THREADS> share(index::pages_of(a, t) + (range.count ? range.first / PAGE : 0), range.count, 0,
                                             1, reinterpret_cast<const uint64_t*>(kept));
    index::Search search(a.topk);
#pragma unroll 1
    for (int digit = 1; digit >= 0; --digit) {
        uint32_t* bins = s.selection.bins + digit * index::BINS;
        index::Counts& counts = s.counts[digit];
        if (digit == 0) index::count_digit(bins, share, 0, search.edge);
        cluster_barrier();
        if (threadIdx.x < index::BINS) {
            uint32_t all = 0, before = 0;
            for (int other = 0; other < a.blocks; ++other) {
                const uint32_t count = peer_value(&bins[threadIdx.x], other);
                all += count, before += other < rank ? count : 0;
            }
            counts.all[threadIdx.x] = all, counts.before[threadIdx.x] = before;
        }
        __syncthreads();
        index::narrow(search, counts);
    }
    cluster_arrive();  // nothing more is read of the others
    index::write_chosen(s.selection, share, search, a.out + t * a.width);
    cluster_wait();
}

// Blocks of a row: as many as its keys need, and more where processors are left that would have enough to do.
static int select_blocks(int64_t rows, int n_pages) {
    int blocks = 1;
    while (n_pages > blocks * (index::RANGE / PAGE)) blocks *= 2;
    while (blocks < index::CLUSTER && 2 * blocks * rows <= BLOCKS / 2 && n_pages >= 2 * blocks * SELECT_PAGES) blocks *= 2;
    return blocks;
}

static cudaError_t select(Arguments& a, int64_t rows, cudaStream_t stream) {
    a.blocks = select_blocks(rows, a.n_pages);
    const int bytes = (a.n_pages + a.blocks - 1) / a.blocks * PAGE * 2;
    if (const cudaError_t error =
            cudaFuncSetAttribute(index_select, cudaFuncAttributeMaxDynamicSharedMemorySize, index::RANGE * 2))
        return error;
    return launch_dependent_clusters(index_select, rows * a.blocks, SELECT_THREADS, bytes, a.blocks, stream, a);
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
    if (n_pages > index::CLUSTER * (index::RANGE / PAGE)) return cudaErrorInvalidValue;
    for (a.first = 0; a.first < rows; a.first += slice) {
        const int64_t here = rows - a.first < slice ? rows - a.first : slice;
        a.rows = a.first + here;
        if (scored) {
            const cudaError_t error =
                heads <= 16 ? score<1>(a, here, together, stream) : score<4>(a, here, together, stream);
            if (error) return error;
        }
        if (together) continue;
        if (const cudaError_t error = select(a, here, stream)) return error;
    }
    return cudaSuccess;
}
