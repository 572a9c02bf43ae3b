// LINEAR: projections of up to eight tokens. A pair of blocks has tiles of one input, and each block some of the slices: so
// tiles that are wide in bytes are shared, and a block stages half of each token. Its warps take (tile, slice) units in
// turn; the sums of both blocks meet through their shared memory and are added up in the order of slices, as in
// linear_few.cuh, and so are the bits.
// While blocks wait for each other and nobody knows the tokens yet, a warp unpacks the first weights of its first unit.
#pragma once
#include <dsv4/cluster.cuh>
#include <dsv4/linear.cuh>
#include <dsv4/rms_norm.cuh>
#include <dsv4/persistent/stream.cuh>

namespace dsv4::persistent {

constexpr int MOST_PARTS = 16, CHUNK_BLOCKS = 4;  // the latter: of NVFP4
constexpr int EARLY_BLOCKS = 3;                   // are unpacked early: as many as there are registers for

struct Linear {
    linear::Part parts[MOST_PARTS];
    const float* norm;  // [K] weights of a norm that comes first; or null
    float eps;
    int count, tokens, columns, blocks, slices;  // of parts; ..; K; K/64; K/512
    int per_token, per_slice[2];                 // 2^16 / tokens and / slices of a block, and one: they divide what is small
    int ranks;                                   // blocks that share their tiles: one or two
    uint16_t cuts[MAX_BLOCKS + 1];               // those numbered b have the tiles cuts[b] .. cuts[b + 1]
};

// A block's part of the work.
struct LinearShare {
    int rank, first, tiles;      // tiles first .. of all
    int begin, count, per_slice; // slices
    int window;                  // room for slices, in both blocks alike

    __device__ __forceinline__ explicit LinearShare(const Linear& a) {
        const bool two = a.ranks == 2;
        const int number = two ? blockIdx.x / 2 : blockIdx.x, middle = a.slices / 2;
        rank = two ? blockIdx.x % 2 : 0;
        first = a.cuts[number], tiles = a.cuts[number + 1] - first;
        begin = rank == 0 ? 0 : middle, count = two ? (rank == 0 ? middle : a.slices - middle) : a.slices;
        per_slice = a.per_slice[rank], window = two ? a.slices - middle : a.slices;
    }
};

// A warp's units: a tile of the block, the part it belongs to, and a slice of the block's.
struct LinearUnit {
    int tile, slice, part = 0;

    __device__ __forceinline__ explicit LinearUnit(const LinearShare& share) {
        const int warp = threadIdx.x / 32;
        tile = share.count > 0 ? warp * share.per_slice >> 16 : share.tiles, slice = warp - tile * share.count;
    }
    __device__ __forceinline__ void find_part(const Linear& a, int first) {
        while (part + 1 < a.count && first + tile >= a.parts[part + 1].first_tile) ++part;
    }
    __device__ __forceinline__ void advance(const LinearShare& share) {
        const int tiles_on = WARPS * share.per_slice >> 16;
        tile += tiles_on, slice += WARPS - tiles_on * share.count;
        if (slice >= share.count) slice -= share.count, ++tile;
    }
    __device__ __forceinline__ int blocks(const Linear& a, const LinearShare& share) const {
        return min(a.blocks - (share.begin + slice) * linear::SLICE_BLOCKS, linear::SLICE_BLOCKS);
    }
};

// The first blocks of a warp's first unit, unpacked, if that is a whole slice of NVFP4.
struct Ahead {
    bool ready;
    uint32_t a[EARLY_BLOCKS][4][4];
};

__device__ __forceinline__ void prepare_linear(int turn, const Stream& stream, Ahead& ahead) {
    const Linear& a = payload<Linear>(turn);
    const LinearShare share(a);
    LinearUnit unit(share);
    ahead.ready = false;
    if (unit.tile >= share.tiles) return;
    unit.find_part(a, share.first);
    ahead.ready = a.parts[unit.part].format == linear::NVFP4 && unit.blocks(a, share) == linear::SLICE_BLOCKS;
    if (!ahead.ready) return;
    const uint8_t* chunk = stream.wait();
    stream.wait_second();
#pragma unroll
    for (int k = 0; k < EARLY_BLOCKS; ++k) linear::nvfp4_operands(ahead.a[k], chunk + k * w4::BLOCK_BYTES);
}

// sum = the unit that `ahead` has begun.
__device__ __forceinline__ void begun_unit(float (&sum)[1][1][4], const Ahead& ahead, const uint8_t* x,
                                           const linear::Rows<1>& rows, Stream& stream) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[0][0][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < EARLY_BLOCKS; ++k) {
        uint32_t b[8];
        load_b(b, x + k * 128 + rows.offset(0));
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_f16(sum[0][0], ahead.a[k][j], b[2 * j], b[2 * j + 1]);
    }
    const uint8_t* chunk = stream.chunk_at_head();
#pragma unroll
    for (int k = EARLY_BLOCKS; k < CHUNK_BLOCKS; ++k)
        linear::unscaled_block<linear::NVFP4>(sum, chunk + k * w4::BLOCK_BYTES, x + k * 128, rows);
    stream.release();
    chunk = stream.chunk_at_head();
#pragma unroll
    for (int k = 0; k < CHUNK_BLOCKS; ++k)
        linear::unscaled_block<linear::NVFP4>(sum, chunk + k * w4::BLOCK_BYTES, x + (CHUNK_BLOCKS + k) * 128, rows);
    stream.release();
    stream.fill();
}

// A warp's slice of a token, normed as norm_row does it, and staged if it is the block's: there are no more slices of
// tokens than warps. shares [tokens][2 slices]: a row's sums of squares, by 256 columns.
__device__ __forceinline__ void stage_normed(const Linear& a, const LinearShare& mine, const linear::Part& part, uint8_t* x,
                                             int stride, float* undo, float* shares) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    int token = 0, slice = warp;
    for (; slice >= a.slices; slice -= a.slices) ++token;
    const int column = slice * SLICE + lane * 16, left = a.columns - column;
    const bool exists = token < a.tokens;
    uint32_t pairs[8] = {};
    float4 w[4] = {};
    if (exists) {
        load_columns(pairs, part.x + token * part.x_stride + column, left, part.x_wide);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (left > 0) w[i] = reinterpret_cast<const float4*>(a.norm + column)[i];
    }
    float v[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = __uint_as_float(i % 2 ? pairs[i / 2] & 0xFFFF0000u : pairs[i / 2] << 16);
    const float share = norm_share(v);
    shares += token * 2 * a.slices;
    if (exists && lane % 16 == 0) shares[2 * slice + lane / 16] = share;
    __syncthreads();
    slice -= mine.begin;
    if (!exists || slice < 0 || slice >= mine.count) return;
    const float scale = norm_scale(shares, 2 * a.slices, a.columns, a.eps);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        pairs[2 * i] = bf16x2(normed(v[4 * i], scale, w[i].x), normed(v[4 * i + 1], scale, w[i].y));
        pairs[2 * i + 1] = bf16x2(normed(v[4 * i + 2], scale, w[i].z), normed(v[4 * i + 3], scale, w[i].w));
    }
    const float back = part.format == linear::PLAIN ? 1.0f : scale_to_f16(pairs);
    uint4* to = reinterpret_cast<uint4*>(x + token * stride + slice * 1024 + lane * 32);
    to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
    if (lane == 0) undo[slice * TOKENS + token] = back;
}

// Work area: x [tokens][window] slices | undo [window][8] | slots [tile][window][tokens][16]. joined: the work area is
// written to before the next meeting.
__device__ __forceinline__ void linear_phase(int turn, Stream& stream, const Ahead& ahead, bool joined) {
    const Linear& a = payload<Linear>(turn);
    const LinearShare share(a);
    if (share.tiles == 0) return;
    const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int stride = share.window * 1024 + 16, tokens = a.tokens, step = tokens * linear::TILE_ROWS;
    uint8_t* const x = memory() + WORK_AT;
    float* const undo = reinterpret_cast<float*>(x + tokens * stride);
    float* const slots = undo + share.window * TOKENS;
    int own = 0;  // the part of the block's first tile
    while (own + 1 < a.count && share.first >= a.parts[own + 1].first_tile) ++own;
    if (a.norm != nullptr)
        stage_normed(a, share, a.parts[own], x, stride, undo, slots);
    else if (share.count > 0)
        linear::stage_slices<WARPS, 2>(a.parts[own], tokens, a.columns, share.begin, share.count, x, stride, undo);
    const linear::Rows<1> rows(tokens, stride);
    __syncthreads();

    bool begun = ahead.ready;
    for (LinearUnit unit(share); unit.tile < share.tiles; unit.advance(share)) {
        unit.find_part(a, share.first);
        const linear::Part& part = a.parts[unit.part];
        float sum[1][1][4];
        if (begun)
            begun_unit(sum, ahead, x + unit.slice * 1024, rows, stream);
        else
            linear::slice_product(sum, part, part.format, share.first + unit.tile - part.first_tile, 1,
                                  share.begin + unit.slice, unit.blocks(a, share), x + unit.slice * 1024, rows, stream,
                                  [](Stream& s) {
                                      s.release();
                                      s.fill();
                                  });
        begun = false;
        linear::undo_scaling(sum, part.format, undo + unit.slice * TOKENS);
        float* slot = slots + (unit.tile * share.window + unit.slice) * step + g;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (2 * t + i % 2 < tokens) slot[(2 * t + i % 2) * linear::TILE_ROWS + i / 2 * 8] = sum[0][0][i];
    }
    const bool two = a.ranks == 2;
    if (two) cluster_barrier();
    else __syncthreads();

    const int all = share.tiles * step, from = two ? all * share.rank / 2 : 0, to = two ? all * (share.rank + 1) / 2 : all;
    for (int i = from + thread; i < to; i += THREADS) {
        const int row = i % linear::TILE_ROWS, pair = i / linear::TILE_ROWS;
        const int at = pair * a.per_token >> 16, token = pair - at * tokens;
        const float* slot = slots + at * share.window * step + token * linear::TILE_ROWS + row;
        while (own + 1 < a.count && share.first + at >= a.parts[own + 1].first_tile) ++own;
        float y = 0.0f, theirs[WARPS / 2] = {};
        const int others = a.slices - share.count;
        if (two)
#pragma unroll
            for (int k = 0; k < WARPS / 2; ++k)
                if (k < others) theirs[k] = peer_value(slot + k * step, share.rank ^ 1);
        const auto add_theirs = [&] {
#pragma unroll
            for (int k = 0; k < WARPS / 2; ++k) y = k < others ? y + theirs[k] : y;
        };
        if (share.rank == 1) add_theirs();
#pragma unroll 4
        for (int k = 0; k < share.count; ++k) y += slot[k * step];
        if (share.rank == 0) add_theirs();
        const linear::Part& part = a.parts[own];
        linear::put(part, (share.first + at - part.first_tile) * linear::TILE_ROWS + row, token, y);
    }
    if (two && joined) cluster_barrier();  // the peer has read the slots
}

// cuts [grid / ranks + 1]. norm [K], if there is one: x is normed first. joined: the next phase is one that needs nothing of this.
static cudaError_t describe_linear(Phase* phase, const linear::Part* parts, int count, const uint16_t* cuts, int grid,
                                   int tokens, int columns, const float* norm, float eps, int joined, int ranks) {
    if (ranks < 1 || ranks > 2 || grid % ranks) return cudaErrorInvalidValue;
    if (count < 1 || count > MOST_PARTS || grid > MAX_BLOCKS || tokens < 1 || tokens > TOKENS) return cudaErrorInvalidValue;
    Linear a = {};
    for (int i = 0; i < count; ++i) a.parts[i] = parts[i];
    for (int b = 0; b <= grid / ranks; ++b) a.cuts[b] = cuts[b];
    a.count = count, a.tokens = tokens, a.columns = columns;
    a.blocks = (columns + linear::BLOCK_COLUMNS - 1) / linear::BLOCK_COLUMNS;
    a.slices = (a.blocks + linear::SLICE_BLOCKS - 1) / linear::SLICE_BLOCKS;
    if (a.slices < 1 || a.slices > WARPS) return cudaErrorInvalidValue;
    a.per_token = (1 << 16) / tokens + 1, a.ranks = ranks;
    for (int rank = 0; rank < 2; ++rank) {
        const int some = ranks == 1 ? a.slices : rank == 0 ? a.slices / 2 : a.slices - a.slices / 2;
        a.per_slice[rank] = some > 0 ? (1 << 16) / some + 1 : 0;
    }
    a.norm = norm, a.eps = eps;
    if (norm != nullptr && (tokens * a.slices > WARPS || columns > 4096 || columns % 16 || !aligned16(norm))) return cudaErrorInvalidValue;
    fill_phase(phase, LINEAR, a);
    phase->joined = joined;
    return cudaSuccess;
}

}  // namespace dsv4::persistent
