// What kernels for up to eight tokens share: how a row is cut into slices and pieces, the tokens that are multiplied with,
// and the product of a block. Slices, scaling and every order of addition are those of moe_stream.cuh, and so are the bits.
#pragma once
#include <dsv4/half.cuh>
#include <dsv4/moe_few_plan.cuh>
#include <dsv4/mma.cuh>

namespace dsv4::moe {

constexpr int MOST_SLICES = 16;

// How a row of K/64 blocks is cut into slices, each scaled and summed by itself: 2^cuts of them.
__host__ __device__ __forceinline__ int cuts_of(int blocks) { return blocks <= 64 ? 3 : 4; }
__host__ __device__ __forceinline__ int stride_of(int blocks) { return blocks * 128 + 16; }  // rows off others' banks

// The blocks of one of the 2^halvings pieces of a row: whole slices.
__host__ __device__ __forceinline__ int piece_begin(int blocks, int piece, int halvings) {
    const int cuts = cuts_of(blocks);
    return (piece << (cuts - halvings)) * blocks >> cuts;
}

// The same in every lane, and known to be: what is computed of it is computed once.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(ALL, x, 0); }

// Rows of BF16 into shared memory as FP16, every slice scaled by a power of two; undo [row][MOST_SLICES] takes it back.
// A warp takes 512 columns: as many slices at once as fit, each in its own 2^bits lanes;
// of AT_ONCE times so many the loads are in flight together. By so many STAGERS, warps.
template <int AT_ONCE, int STAGERS = FEW_WARPS>
struct Staging {
    const bf16* x;
    int64_t x_row;
    int rows, columns, blocks, cuts, bits;
    uint4 low[AT_ONCE], high[AT_ONCE];

    __device__ __forceinline__ Staging(const bf16* x, int64_t x_row, int rows, int columns, int blocks)
        : x(x), x_row(x_row), rows(rows), columns(columns), blocks(blocks), cuts(cuts_of(blocks)) {
        const int widest = (blocks + (1 << cuts) - 1) >> cuts;  // 1..8 blocks of four lanes
        bits = 2 + (widest > 1) + (widest > 2) + (widest > 4);
    }

    struct Place {
        int row, slice, first, lanes;  // the slice's first block, and how many lanes it needs
    };
    __device__ __forceinline__ int tasks() const { return rows << (cuts - (5 - bits)); }
    __device__ __forceinline__ Place place(int task) const {
        const int lane = threadIdx.x % 32, more = cuts - (5 - bits);
        const int slice = ((task & ((1 << more) - 1)) << (5 - bits)) + (lane >> bits);
        const int first = slice * blocks >> cuts, stop = (slice + 1) * blocks >> cuts;
        return {task >> more, slice, first, 4 * (stop - first)};
    }
    // What another block has just written is not in this processor's own cache.
    __device__ __forceinline__ void load(int begin) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int task = begin + i * STAGERS, lane = threadIdx.x % (1 << bits);
            const Place at = place(task);
            const int column = at.first * 64 + lane * 16;
            low[i] = high[i] = make_uint4(0, 0, 0, 0);
            if (task < tasks() && lane < at.lanes && column < columns) {  // columns are whole groups of 16
                const uint4* p = reinterpret_cast<const uint4*>(x + at.row * x_row + column);
                low[i] = __ldcg(p), high[i] = __ldcg(p + 1);
            }
        }
    }
    __device__ __forceinline__ void store(int begin, uint8_t* staged, float* undo) const {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int task = begin + i * STAGERS, lane = threadIdx.x % (1 << bits);
            if (task >= tasks()) break;
            const Place at = place(task);
            uint32_t x[8] = {low[i].x, low[i].y, low[i].z, low[i].w, high[i].x, high[i].y, high[i].z, high[i].w};
            uint32_t most = 0;
#pragma unroll
            for (int k = 0; k < 8; ++k) most = magnitudes(most, x[k]);
            most = max(most & 0xFFFFu, most >> 16);
#pragma unroll 1
            for (int step = 1; step < 1 << bits; step *= 2) most = max(most, __shfl_xor_sync(ALL, most, step));
            const int shift = f16_shift(most);
            const float factor = power_of_two(shift);
#pragma unroll
            for (int k = 0; k < 8; ++k) x[k] = to_f16(x[k], factor);
            if (lane < at.lanes) {
                uint4* to = reinterpret_cast<uint4*>(staged + at.row * stride_of(blocks) + at.first * 128 + lane * 32);
                to[0] = make_uint4(x[0], x[1], x[2], x[3]);
                to[1] = make_uint4(x[4], x[5], x[6], x[7]);
            }
            if (lane == 0) undo[at.row * MOST_SLICES + at.slice] = power_of_two(-shift);
        }
    }
    // All rows, of which the first `AT_ONCE` tasks of this warp have been loaded.
    __device__ __forceinline__ void finish(int warp, uint8_t* staged, float* undo) {
#pragma unroll 1
        for (int begin = warp; begin < tasks();) {
            store(begin, staged, undo);
            begin += STAGERS * AT_ONCE;
            if (begin < tasks()) load(begin);
        }
    }
};

// A block of weights times the lane's columns of eight tokens.
__device__ __forceinline__ void multiply_block(float (&even)[4], float (&odd)[4], const w4::Lane& part,
                                               const uint8_t* columns) {
    const uint32_t words[4] = {part.codes.x, part.codes.y, part.codes.z, part.codes.w};
    uint32_t scale, scale8, a[4], b[8];
    load_b(b, columns);
    w4::scales(part.scales, scale, scale8);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        w4::dequantize(a, words[j], scale, scale8);
        mma_f16(j % 2 ? odd : even, a, b[2 * j], b[2 * j + 1]);
    }
}

}  // namespace dsv4::moe
