// index_topk in two launches: the scores of a slice of rows, as sortable 16-bit keys, then each row's selection.
//
// Scores: heads are the rows of the products, entries the columns. A warp keeps the keys of NT x 8 entries in registers
// and meets them with the queries of one token after another; queries arrive in shared memory one token ahead. Decode:
// one token a block. Prefill: 16 tokens a block, so keys are read and decoded once for all of them.
//
// Selection: a block per row finds the threshold with two histograms (11 bits, then 5) and writes what lies above it,
// and the first of what equals it, in the order of entries.
#include <dsv4/dependent.cuh>
#include <dsv4/fragments.cuh>
#include <dsv4/index_key.cuh>
#include <dsv4/mma.cuh>
#include <dsv4/numbers.cuh>

using namespace dsv4;

namespace {

using dsv4::index::PAGE;
using dsv4::index::WIDTH;

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TILE_ROWS = 16, DECODE_ROWS = 64, BLOCKS = 528;  // four blocks for each multiprocessor of an H200

struct Arguments {
    const uint8_t* q;  // [T, Hi, 128] BF16
    const void* weights;  // [T, Hi] BF16 or float32
    int64_t weight_stride;
    const uint8_t* keys;
    const int64_t *pages, *sequence, *visible;
    uint16_t* scores;  // [slice, 64 P]
    int64_t* out;      // [T, width]
    int64_t rows, first;  // of all, and the first of this slice
    int heads, n_pages, topk, width, tile_rows;
    float weight_scale;
    bool packed, f32_weights;
};

// Entries that row t has to choose from; 0: it takes all it sees, or is a padding row.
__device__ __forceinline__ int to_score(const Arguments& a, int64_t t) {
    const int64_t visible = a.sequence[t] < 0 ? 0 : min(a.visible[t], static_cast<int64_t>(a.n_pages) * PAGE);
    return visible > a.topk ? static_cast<int>(visible) : 0;
}

// A head's weight, rounded to BF16 before it is scaled.
__device__ __forceinline__ float weight_of(const Arguments& a, int64_t t, int head) {
    if (head >= a.heads) return 0.0f;
    const int64_t at = t * a.weight_stride + head;
    const float w = a.f32_weights ? rounded<bf16>(static_cast<const float*>(a.weights)[at])
                                  : to_float(static_cast<const bf16*>(a.weights)[at]);
    return __fmul_rn(w, a.weight_scale);
}

// BF16 bits to a key that sorts like the value: -0 as 0, NaN above all.
__device__ __forceinline__ uint32_t sortable(float score) {
    const uint32_t bits = from_float<bf16>(score).bits;
    if ((bits & 0x7FFF) > 0x7F80) return 0xFFFF;
    if (bits == 0x8000) return 0x8000;
    return bits & 0x8000 ? ~bits & 0xFFFF : bits | 0x8000;
}

template <int MT>
struct Queries {
    // Rows of 16 chunks of 16 bytes. Lane (g, t) reads chunk 4 t + i of row g: where a chunk lies keeps the eight lanes
    // that are served together in different banks.
    alignas(16) uint8_t heads[2][MT * 16][WIDTH * 2];
    bf16 weights[2][MT * 16];
    int seen[TILE_ROWS], sequence[TILE_ROWS];

    __device__ uint8_t* chunk(int buffer, int row, int c) {
        return heads[buffer][row] + (c ^ (c >> 3 & 1) ^ (row & 1) << 1) * 16;
    }
};

template <int MT, int NT>
__global__ void __launch_bounds__(THREADS, 2) index_scores(const __grid_constant__ Arguments a) {
    __shared__ Queries<MT> s;
    take_turn();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int64_t first = a.first + static_cast<int64_t>(blockIdx.y) * a.tile_rows;
    const int rows = static_cast<int>(min(a.rows - first, static_cast<int64_t>(a.tile_rows)));
    if (threadIdx.x < rows) {
        s.seen[threadIdx.x] = to_score(a, first + threadIdx.x);
        s.sequence[threadIdx.x] = static_cast<int>(a.sequence[first + threadIdx.x]);
    }
    for (int i = a.heads * (WIDTH / 8) + threadIdx.x; i < MT * 16 * (WIDTH / 8); i += THREADS)
        for (int buffer = 0; buffer < 2; ++buffer)  // heads that are not there
            *reinterpret_cast<uint4*>(s.chunk(buffer, i / 16, i % 16)) = make_uint4(0, 0, 0, 0);
    __syncthreads();
    int most = 0;
    for (int r = 0; r < rows; ++r) most = max(most, s.seen[r]);

    const auto fetch = [&](int r, int buffer) {
        const uint8_t* from = a.q + (first + r) * a.heads * (WIDTH * 2);
        for (int i = threadIdx.x; i < a.heads * (WIDTH / 8); i += THREADS)
            copy_async16(s.chunk(buffer, i / 16, i % 16), from + 16 * i);
        return weight_of(a, first + r, threadIdx.x);  // of this thread's head, stored when it is needed
    };
    const int swap = (4 * t) >> 3 & 1 ^ (g & 1) << 1;
    bool fetched = false;  // the queries of a block's only row stay
    float weight = 0.0f, next_weight = 0.0f;

    for (int entry = blockIdx.x * (WARPS * NT * 8); entry < most; entry += gridDim.x * (WARPS * NT * 8)) {
        const auto next_row = [&](int r) {
            do ++r;
            while (r < rows && s.seen[r] <= entry);
            return r;
        };
        const int mine = entry + warp * (NT * 8);
        uint32_t b[NT][16];
        int held = -1, buffer = 0, r = next_row(-1);
        if (!fetched) weight = fetch(r, 0);
        fetched = rows == 1;
        copies_commit();
        while (r < rows) {
            const int next = next_row(r);
            if (next < rows) next_weight = fetch(next, buffer ^ 1);
            copies_commit();
            if (s.sequence[r] != held) {
                held = s.sequence[r];
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    const int e = mine + n * 8 + g;
                    const int64_t page = e < a.n_pages * PAGE ? a.pages[int64_t(held) * a.n_pages + e / PAGE] : -1;
                    const int64_t row = page * PAGE + e % PAGE;
                    if (page < 0)
                        for (int i = 0; i < 16; ++i) b[n][i] = 0;
                    else if (a.packed)
                        index::load_packed(b[n], a.keys + row * index::PACKED_BYTES, t);
                    else
                        index::load_plain(b[n], a.keys + row * index::PLAIN_BYTES, t);
                }
            }
            if (threadIdx.x < MT * 16) s.weights[buffer][threadIdx.x] = from_float<bf16>(weight);
            copies_wait_but<1>();
            __syncthreads();
            const uint8_t* queries = s.heads[buffer][g] + t * 64;
            float sum[NT][2] = {};
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                float dot[NT][4] = {};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    // rows that lie an even number apart have their chunks in the same places
                    const uint8_t* at = queries + (i ^ swap) * 16 + mt * (16 * WIDTH * 2);
                    const uint4 x = *reinterpret_cast<const uint4*>(at);
                    const uint4 y = *reinterpret_cast<const uint4*>(at + 8 * WIDTH * 2);
                    const uint32_t a0[4] = {x.x, y.x, x.y, y.y}, a1[4] = {x.z, y.z, x.w, y.w};
#pragma unroll
                    for (int n = 0; n < NT; ++n) {
                        mma_bf16(dot[n], a0, b[n][4 * i], b[n][4 * i + 1]);
                        mma_bf16(dot[n], a1, b[n][4 * i + 2], b[n][4 * i + 3]);
                    }
                }
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const uint32_t share = s.weights[buffer][mt * 16 + h * 8 + g].bits * 0x10001u;  // twice
                        const uint32_t both = mul_bf16x2(relu_bf16x2(dot[n][2 * h], dot[n][2 * h + 1]), share);
                        sum[n][0] += __uint_as_float(both << 16);
                        sum[n][1] += __uint_as_float(both & 0xFFFF0000u);
                    }
            }
#pragma unroll
            for (int n = 0; n < NT; ++n) {
#pragma unroll
                for (int step = 4; step < 32; step *= 2) {
                    sum[n][0] += __shfl_xor_sync(0xffffffffu, sum[n][0], step);
                    sum[n][1] += __shfl_xor_sync(0xffffffffu, sum[n][1], step);
                }
                const int e = mine + n * 8 + 2 * t;
                if (g == n && e < a.n_pages * PAGE)
                    *reinterpret_cast<uint32_t*>(a.scores + (first - a.first + r) * a.n_pages * PAGE + e) =
                        sortable(sum[n][0]) | sortable(sum[n][1]) << 16;
            }
            __syncthreads();  // nobody reads the buffer any more
            r = next, buffer ^= 1;
            if (r < rows) weight = next_weight;
        }
    }
}

// Selection ------------------------------------------------------------------------------------------------------------

constexpr int SELECT_THREADS = 1024, SELECT_WARPS = SELECT_THREADS / 32, EACH = 8;
constexpr int COARSE = 2048, FINE = 32;                // bins: the upper 11 bits of a key, then the lower 5
constexpr int CACHED_BYTES = 80 * 1024;                // keys kept in shared memory between passes, where they fit

// The sum over the threads before this one, and over all. Two barriers.
__device__ __forceinline__ uint32_t exclusive_sum(uint32_t x, uint32_t (&warps)[SELECT_WARPS], uint32_t& all) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t sum = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t before = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += before;
    }
    __syncthreads();  // the last call's readers are done
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    uint32_t totals = warps[lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t before = __shfl_up_sync(0xffffffffu, totals, step);
        if (lane >= step) totals += before;
    }
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
    const int n = to_score(a, t);
    const auto pool_row = [&](int e) { return pages[e / PAGE] * PAGE + e % PAGE; };
    if (n == 0) {
        const int64_t visible = sequence < 0 ? 0 : a.visible[t];
        for (int e = threadIdx.x; e < a.width; e += SELECT_THREADS) out[e] = e < visible ? pool_row(e) : -1;
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
        const uint32_t own = fine[code];
        uint32_t sum = own;
#pragma unroll
        for (int step = 1; step < FINE; step *= 2) {
            const uint32_t before = __shfl_up_sync(0xffffffffu, sum, step);
            if (threadIdx.x >= step) sum += before;
        }
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
                out[h++ + min(e, equals)] = pool_row(entry);
            else if (e++ < equals)
                out[h + e - 1] = pool_row(entry);
        }
        higher += all & 0xFFFF, same += all >> 16;
    }
}

template <int MT, int NT>
static cudaError_t score(const Arguments& a, int64_t rows, cudaStream_t stream) {
    const int entries = a.n_pages * PAGE, blocks = (entries + WARPS * NT * 8 - 1) / (WARPS * NT * 8);
    const int tiles = static_cast<int>((rows + a.tile_rows - 1) / a.tile_rows);
    const int most = NT == 1 ? static_cast<int>((BLOCKS + rows - 1) / rows) : blocks;
    return launch_dependent(index_scores<MT, NT>, blocks < most ? blocks : most, tiles, THREADS, 0, stream, a);
}

template <int NT>
static cudaError_t score(const Arguments& a, int64_t rows, cudaStream_t stream) {
    return a.heads <= 16 ? score<1, NT>(a, rows, stream) : score<4, NT>(a, rows, stream);
}

}  // namespace

extern "C" int dsv4_index_topk(const void* q, const void* weights, const void* keys, const void* pages,
                               const void* sequence, const void* visible, void* scores, void* out, int64_t rows,
                               int64_t weight_stride, int64_t slice, int heads, int n_pages, int topk, int width,
                               int packed, int weight_dtype, float weight_scale, cudaStream_t stream) {
    if (rows == 0 || width == 0) return cudaSuccess;
    if (!aligned16(q) || !aligned16(keys) || !aligned16(scores)) return cudaErrorMisalignedAddress;
    Arguments a = {};
    a.q = static_cast<const uint8_t*>(q), a.weights = weights, a.weight_stride = weight_stride;
    a.f32_weights = weight_dtype == F32, a.weight_scale = weight_scale;
    a.keys = static_cast<const uint8_t*>(keys);
    a.pages = static_cast<const int64_t*>(pages), a.sequence = static_cast<const int64_t*>(sequence);
    a.visible = static_cast<const int64_t*>(visible), a.scores = static_cast<uint16_t*>(scores);
    a.out = static_cast<int64_t*>(out), a.heads = heads, a.n_pages = n_pages, a.topk = topk, a.width = width;
    a.packed = packed != 0;
    const bool decode = rows <= DECODE_ROWS;
    a.tile_rows = decode ? 1 : TILE_ROWS;
    const int bytes = n_pages * PAGE * 2 < CACHED_BYTES ? n_pages * PAGE * 2 : CACHED_BYTES;
    if (const cudaError_t error =
            cudaFuncSetAttribute(index_select, cudaFuncAttributeMaxDynamicSharedMemorySize, CACHED_BYTES))
        return error;
    for (a.first = 0; a.first < rows; a.first += slice) {
        const int64_t here = rows - a.first < slice ? rows - a.first : slice;
        a.rows = a.first + here;
        if (topk < n_pages * PAGE) {
            const cudaError_t error = decode ? score<1>(a, here, stream) : score<4>(a, here, stream);
            if (error) return error;
        }
        const cudaError_t error = launch_dependent(index_select, here, 1, SELECT_THREADS, bytes, stream, a, bytes);
        if (error) return error;
    }
    return cudaSuccess;
}
