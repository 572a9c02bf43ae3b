// Scores of index keys: heads are the rows of the products, entries the columns. In decode steps blocks take a row's queries
// as the projection leaves them, treat them (index_query.cuh) and score, a warp 16 entries at a time.
#pragma once
#include <dsv4/index_key.cuh>
#include <dsv4/index_query.cuh>
#include <dsv4/launch.cuh>
#include <dsv4/mma.cuh>
#include <dsv4/numbers.cuh>

namespace dsv4::index {

constexpr int ROW_BYTES = WIDTH * 2;
constexpr int ENTRIES = 16;  // decode: of a warp at a time

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

#define INDEX_PARAMETERS                                                                                            \
    const void *q, const void *cis, const void *weights, const void *keys, const void *pages, const void *sequence,  \
        const void *visible, void *scores, void *out, int64_t rows, int64_t cis_stride, int64_t weight_stride,        \
        int64_t slice, int heads, int dims, int n_pages, int sequences, int topk, int width, int packed,              \
        int weight_dtype, int quantize, float weight_scale
#define INDEX_VALUES                                                                                                  \
    q, cis, weights, keys, pages, sequence, visible, scores, out, rows, cis_stride, weight_stride, slice, heads, dims, \
        n_pages, sequences, topk, width, packed, weight_dtype, quantize, weight_scale

static cudaError_t arguments(Arguments& a, INDEX_PARAMETERS) {
    if (!aligned16(q) || !aligned16(keys) || !aligned16(scores)) return cudaErrorMisalignedAddress;
    a = {};
    a.q = static_cast<const uint8_t*>(q), a.cis = static_cast<const float2*>(cis), a.cis_stride = cis_stride;
    a.weights = weights, a.weight_stride = weight_stride;
    a.f32_weights = weight_dtype == F32, a.weight_scale = weight_scale;
    a.keys = static_cast<const uint8_t*>(keys);
    a.pages = static_cast<const int64_t*>(pages), a.sequence = static_cast<const int64_t*>(sequence);
    a.visible = static_cast<const int64_t*>(visible), a.scores = static_cast<uint16_t*>(scores);
    a.out = static_cast<int64_t*>(out), a.heads = heads, a.dims = dims, a.n_pages = n_pages, a.sequences = sequences;
    a.rows = rows, a.topk = topk, a.width = width, a.packed = packed != 0, a.quantize = quantize != 0;
    return cudaSuccess;
}

// Entries that row t has to choose from; 0: it takes all it sees, or is a padding row.
__device__ __forceinline__ int to_score(const Arguments& a, int64_t sequence, int64_t visible) {
    visible = sequence < 0 ? 0 : min(visible, static_cast<int64_t>(a.n_pages) * PAGE);
    return visible > a.topk ? static_cast<int>(visible) : 0;
}

__device__ __forceinline__ const int64_t* pages_of(const Arguments& a, int64_t t) {
    return a.pages + a.sequence[t] * a.n_pages;
}
__device__ __forceinline__ int64_t pool_row(const int64_t* pages, int e) { return pages[e / PAGE] * PAGE + e % PAGE; }

// The result of a row that takes all it sees: every `step`-th from `e` on.
__device__ __forceinline__ void take_all(const Arguments& a, int64_t t, int e, int step) {
    const int64_t sequence = a.sequence[t], seen = sequence < 0 ? 0 : a.visible[t];
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
    const uint32_t key = bits == 0x8000 ? 0x8000 : bits ^ (bits >> 15 ? 0xFFFF : 0x8000);
    return (bits & 0x7FFF) > 0x7F80 ? 0xFFFF : key;
}

// Where chunk c (of 16 bytes) of a head's row lies. Lane (g, t) reads chunks 4 t .. 4 t + 3 of row g and writes, treated,
// chunks 2 g and 2 g + 1 of rows 2 t and 2 t + 1 where a warp treats eight heads: lanes that are served together meet
// different banks in both. Rows that lie 8 apart have their chunks in the same places. Of four neighbours, from a
// multiple of four on, chunk c + i is at chunk_at(row, c) ^ 16 i.
__device__ __forceinline__ int chunk_at(int row, int c) {
    return row * ROW_BYTES + (c ^ (c >> 3 & 1) ^ (row & 1) << 1 ^ (row >> 1 & 1) ^ (row >> 2 & 1) << 2) * 16;
}

// shares[h][n]: what head 8 h + g of these sixteen adds to columns 2 t and 2 t + 1 of tile n, a BF16 each.
template <int NT>
__device__ __forceinline__ void head_shares(uint32_t (&shares)[2][NT], const uint8_t* heads, const bf16* weights,
                                            const uint32_t (&b)[NT][16], int g, int t) {
    float dot[NT][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint8_t* at = heads + (chunk_at(g, 4 * t) ^ 16 * i);
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
        const uint32_t weight = weights[h * 8 + g].bits * 0x10001u;  // twice
#pragma unroll
        for (int n = 0; n < NT; ++n)
            shares[h][n] = mul_bf16x2(relu_bf16x2(dot[n][2 * h], dot[n][2 * h + 1]), weight);
    }
}

// sum[n][j]: of column 2 t + j of tile n, over this lane's heads in their order.
template <int NT>
__device__ __forceinline__ void add_shares(float (&sum)[NT][2], const uint32_t (&shares)[2][NT]) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int n = 0; n < NT; ++n) sum[n][0] += low_half(shares[h][n]), sum[n][1] += high_half(shares[h][n]);
}

// sum[n][j]: this lane's heads' share of the score of column 2 t + j of tile n.
template <int MT, int NT>
__device__ __forceinline__ void score_tiles(float (&sum)[NT][2], const uint8_t* heads, const bf16* weights,
                                            const uint32_t (&b)[NT][16], int g, int t) {
#pragma unroll
    for (int n = 0; n < NT; ++n) sum[n][0] = sum[n][1] = 0.0f;
#pragma unroll NT < 4 ? 2 : 1
    for (int mt = 0; mt < MT; ++mt) {
        uint32_t shares[2][NT];
        head_shares(shares, heads + mt * (16 * ROW_BYTES), weights + mt * 16, b, g, t);
        add_shares(sum, shares);
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

template <int MT, int WARPS = 8>
struct Heads {
    static constexpr int EACH = 64 / WARPS, APART = HeadShare<EACH>::APART;  // EACH: heads that a warp treats
    alignas(16) uint8_t heads[MT * 16 * ROW_BYTES];
    alignas(16) float2 turns[MT * 16 / EACH][WIDTH / 2];  // of each warp that treats heads, by pair
    bf16 weights[MT * 16];
};

// What a warp scores of a decode row. Sixteens of entries go to the blocks in turn, and in each block to its warps.
struct Tiles {
    int n;           // what the row has to choose from; 0: it takes all it sees
    int page, next;  // of the warp's first sixteen and its second, -1 for none
};

// Heads that are not there.
template <int MT, int WARPS>
__device__ __forceinline__ void clear_heads(const Arguments& a, Heads<MT, WARPS>& s) {
    for (int i = a.heads * ROW_BYTES + 16 * threadIdx.x; i < MT * 16 * ROW_BYTES; i += 16 * blockDim.x)
        *reinterpret_cast<uint4*>(s.heads + i) = make_uint4(0, 0, 0, 0);
}

// By each warp that treats heads: its rotations are on their way, and its heads as they come.
template <int MT, int WARPS>
__device__ __forceinline__ void start_turns(const Arguments& a, Heads<MT, WARPS>& s, int64_t row) {
    const int warp = threadIdx.x / 32;
    if (warp * s.EACH >= a.heads) return;
    float2* to = s.turns[warp] + (WIDTH - a.dims) / 2;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < a.dims / 2; i += 32) copy_async8(to + i, a.cis + row * a.cis_stride + i);
}
template <int MT, int WARPS>
__device__ __forceinline__ void start_heads(const Arguments& a, Heads<MT, WARPS>& s, int64_t row) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (warp * s.EACH >= a.heads) return;
    const int head = warp * s.EACH + g / s.APART, half = g % s.APART, at = chunk_at(head, 4 * t) ^ 16 * half;
    const uint8_t* from = a.q + (row * a.heads + head) * ROW_BYTES + 64 * t + 16 * half;
#pragma unroll
    for (int i = 0; i < 4; i += s.APART) copy_async16(s.heads + (at ^ 16 * i), from + 16 * i);
}

// Block `rank` of a.blocks has a part of the row; of its WARPS warps this one is the `place`-th to get entries.
template <int WARPS>
__device__ __forceinline__ Tiles find_tiles(const Arguments& a, int64_t row, int rank, int place) {
    // No load waits for another where, as in most decode steps, a row is the sequence of the same number.
    const int first = place * a.blocks + rank, second = first + WARPS * a.blocks;  // in sixteens of entries
    const bool guess = row < a.sequences && first < a.n_pages * (PAGE / ENTRIES);
    int page = guess ? static_cast<int>(a.pages[row * a.n_pages + first / (PAGE / ENTRIES)]) : -1;
    const int64_t sequence = a.sequence[row], visible = a.visible[row];
    const int n = to_score(a, sequence, visible);
    const int64_t* pages = a.pages + sequence * a.n_pages;
    const auto page_of = [&](int i) {
        return i * ENTRIES < n ? static_cast<int>(pages[i / (PAGE / ENTRIES)]) : -1;
    };
    if (sequence != row || first * ENTRIES >= n) page = page_of(first);
    return {n, page, page_of(second)};
}

// The keys of sixteen `i`, the warp's first, come to the L2 cache.
__device__ __forceinline__ void prefetch(const Arguments& a, const Tiles& tiles, int i) {
    const int bytes = a.packed ? PACKED_BYTES : PLAIN_BYTES, at = threadIdx.x % 32 * 128;
    if (tiles.page < 0 || at >= ENTRIES * bytes) return;
    const uint8_t* from = a.keys + (static_cast<int64_t>(tiles.page) * PAGE + i * ENTRIES % PAGE) * bytes;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
}

// Where the key of column g of tile m of sixteen `i` lies, in its page: it is entry 4 (g / 2) + 2 m + g % 2 of them, so
// that a lane's four scores are neighbours.
__device__ __forceinline__ const uint8_t* key_at(const Arguments& a, int page, int i, int m, int g, int bytes) {
    const int entry = i * ENTRIES % PAGE + g / 2 * 4 + m * 2 + g % 2;
    return a.keys + (static_cast<int64_t>(page) * PAGE + entry) * bytes;
}

// The keys of a lane's four entries, of which `count` are there.
__device__ __forceinline__ uint64_t four_keys(const float (&sum)[2][2], int count) {
    uint64_t four = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const uint32_t key = sortable(sum[k / 2][k % 2]);
        four |= static_cast<uint64_t>(k < count ? key : 0) << 16 * k;
    }
    return four;
}

// By each warp that treats heads: its heads, once they and its rotations have come. Others find them behind a barrier.
template <int MT, int WARPS>
__device__ __forceinline__ void treat_started(const Arguments& a, Heads<MT, WARPS>& s) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (warp * s.EACH >= a.heads) return;
    copies_wait();
    __syncwarp();
    const int half = g % s.APART, own = chunk_at(warp * s.EACH + g / s.APART, 4 * t);
    HeadShare<s.EACH> share = load_head<s.EACH>(
        a.dims, t, [&](int chunk) { return *reinterpret_cast<const uint4*>(s.heads + (own ^ 16 * (chunk % 4))); },
        half);
    float2 by[share.PAIRS];
    const float2* turns = s.turns[warp] + 16 * t + 4 * half;
#pragma unroll
    for (int i = 0; i < share.PAIRS; i += 2) {
        const float4 two = *reinterpret_cast<const float4*>(turns + share.pair(i));
        by[i] = make_float2(two.x, two.y), by[i + 1] = make_float2(two.z, two.w);
    }
    __syncwarp();  // treated heads go where they came
    turn(share, [&](int i) { return by[i]; });
    treat_heads(share, a.quantize, lane, [&](int head, int chunk, uint4 channels) {
        *reinterpret_cast<uint4*>(s.heads + chunk_at(warp * s.EACH + head, chunk)) = channels;
    });
}

// The block's part of a row whose rotations and heads have been started and that does not take all it sees. pages: its.
// put(at, four): in every lane of a column, the keys of entries 4 at .. 4 at + 3, 0 for those that are not there.
template <int MT, int WARPS, typename Put>
__device__ __forceinline__ void score_row(const Arguments& a, Heads<MT, WARPS>& s, int64_t row, const int64_t* pages,
                                          int rank, int place, const Tiles& tiles, Put put) {
    const int n = tiles.n;
    if (rank * ENTRIES >= n) return;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t weight = threadIdx.x < MT * 16 ? weight_bits(a, row, threadIdx.x) : 0;
    const int first = place * a.blocks + rank, stride = WARPS * a.blocks;
    int page = tiles.page, next_page = tiles.next;
    const auto key_at = [&](int i, int m, int bytes) { return index::key_at(a, page, i, m, g, bytes); };
    PackedShare keys[2];
    const auto fetch = [&](int i) {
        keys[0] = keys[1] = NO_KEY;
        if (!a.packed || page < 0) return;
#pragma unroll
        for (int m = 0; m < 2; ++m) keys[m] = fetch_packed(key_at(i, m, PACKED_BYTES), t);
    };
    fetch(first);
    treat_started(a, s);
    if (threadIdx.x < MT * 16) s.weights[threadIdx.x] = weight_of(a, weight);

    uint32_t b[2][16] = {};
#pragma unroll 1
    for (int i = first;; i += stride) {
        const bool there = i * ENTRIES < n;
        if (there && (a.packed || page < 0)) {
#pragma unroll 1
            for (int m = 0; m < 2; ++m) {  // through the second: the code is there once
#pragma unroll
                for (int k = 0; k < 16; ++k) b[0][k] = b[1][k];
                unpack(b[1], keys[0]);
                keys[0] = keys[1];
            }
        } else if (there) {
#pragma unroll
            for (int m = 0; m < 2; ++m) load_plain(b[m], key_at(i, m, PLAIN_BYTES), t);
        }
        if (i == first) __syncthreads();  // all heads are treated
        if (!there) return;
        page = next_page;
        fetch(i + stride);
        const int after = i + 2 * stride;
        next_page = after * ENTRIES < n ? static_cast<int>(pages[after / (PAGE / ENTRIES)]) : -1;
        float sum[2][2];
        score_tiles<MT>(sum, s.heads, s.weights, b, g, t);
        add_heads(sum);
        put(i * (ENTRIES / 4) + t, four_keys(sum, n - i * ENTRIES - 4 * t));
    }
}

}  // namespace dsv4::index
