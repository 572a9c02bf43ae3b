// LINEAR: projections of up to eight tokens. A block has tiles of one input; its warps take (tile, slice) units in turn,
// their sums meet in shared memory and are added up in the order of slices, as in linear_few.cuh, and so are the bits.
#pragma once
#include <dsv4/linear.cuh>
#include <dsv4/persistent/stream.cuh>

namespace dsv4::persistent {

constexpr int MOST_PARTS = 12;

struct Linear {
    linear::Part parts[MOST_PARTS];
    int count, tokens, columns, blocks, slices;  // of parts; ..; K; K/64; K/512
    int per_token;                               // 2^16 / tokens, and one: divides what is far below 2^16
    uint16_t cuts[MAX_BLOCKS + 1];               // block b has the tiles cuts[b] .. cuts[b + 1]
};

// Work area: x [tokens][slices] | undo [slices][8] | slots [tile][slice][tokens][16].
__device__ __forceinline__ void linear_phase(int turn, Stream& stream) {
    const Linear& a = payload<Linear>(turn);
    const int first = a.cuts[blockIdx.x], tiles = a.cuts[blockIdx.x + 1] - first;
    if (tiles == 0) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int stride = a.slices * 1024 + 16, tokens = a.tokens, step = tokens * linear::TILE_ROWS;
    uint8_t* const x = memory() + WORK_AT;
    float* const undo = reinterpret_cast<float*>(x + tokens * stride);
    float* const slots = undo + a.slices * TOKENS;
    int own = 0;  // the part of the block's first tile
    while (own + 1 < a.count && first >= a.parts[own + 1].first_tile) ++own;
    linear::stage_slices<WARPS, 4>(a.parts[own], tokens, a.columns, 0, a.slices, x, stride, undo);
    __syncthreads();

    const auto next = [](Stream& s) {
        s.release();
        s.fill();
    };
    const linear::Rows<1> rows(tokens, stride);
    int tile = warp / a.slices, slice = warp - tile * a.slices, place = own;
    const int tiles_on = WARPS / a.slices, slices_on = WARPS - tiles_on * a.slices;
    while (tile < tiles) {
        while (place + 1 < a.count && first + tile >= a.parts[place + 1].first_tile) ++place;
        const linear::Part& part = a.parts[place];
        float sum[1][1][4];
        linear::slice_product(sum, part, part.format, first + tile - part.first_tile, 1, slice,
                              min(a.blocks - slice * linear::SLICE_BLOCKS, linear::SLICE_BLOCKS), x + slice * 1024, rows,
                              stream, next);
        linear::undo_scaling(sum, part.format, undo + slice * TOKENS);
        float* slot = slots + (tile * a.slices + slice) * step + g;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (2 * t + i % 2 < tokens) slot[(2 * t + i % 2) * linear::TILE_ROWS + i / 2 * 8] = sum[0][0][i];
        tile += tiles_on, slice += slices_on;
        if (slice >= a.slices) slice -= a.slices, ++tile;
    }
    __syncthreads();

    place = own;
    for (int i = threadIdx.x; i < tiles * step; i += THREADS) {
        const int row = i % linear::TILE_ROWS, pair = i / linear::TILE_ROWS;
        const int at = pair * a.per_token >> 16, token = pair - at * tokens;
        const float* slot = slots + at * a.slices * step + token * linear::TILE_ROWS + row;
        while (place + 1 < a.count && first + at >= a.parts[place + 1].first_tile) ++place;
        float y = 0.0f;
#pragma unroll 8
        for (int k = 0; k < a.slices; ++k) y += slot[k * step];
        const linear::Part& part = a.parts[place];
        linear::put(part, (first + at - part.first_tile) * linear::TILE_ROWS + row, token, y);
    }
}

// cuts [grid + 1].
static cudaError_t describe_linear(Phase* phase, const linear::Part* parts, int count, const uint16_t* cuts, int grid,
                                   int tokens, int columns) {
    if (count < 1 || count > MOST_PARTS || grid > MAX_BLOCKS || tokens < 1 || tokens > TOKENS) return cudaErrorInvalidValue;
    Linear a = {};
    for (int i = 0; i < count; ++i) a.parts[i] = parts[i];
    for (int b = 0; b <= grid; ++b) a.cuts[b] = cuts[b];
    a.count = count, a.tokens = tokens, a.columns = columns;
    a.per_token = (1 << 16) / tokens + 1;
    a.blocks = (columns + linear::BLOCK_COLUMNS - 1) / linear::BLOCK_COLUMNS;
    a.slices = (a.blocks + linear::SLICE_BLOCKS - 1) / linear::SLICE_BLOCKS;
    if (a.slices > WARPS) return cudaErrorInvalidValue;
    return fill_phase(phase, LINEAR, a);
}

}  // namespace dsv4::persistent
