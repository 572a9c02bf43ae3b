// Few tokens: every byte of the active experts is read once, and reading is all the time there is.
// A block takes tiles of 16 rows one after the other; its warps share a tile's columns, each with its own ring, into
// which the copy engine brings the blocks of later tiles. A warp keeps its columns of up to 8 tokens in registers, as
// FP16 scaled by a power of two per token (half.cuh), until the group of tokens changes. The warps' sums are
// added in their order, so a token's result depends neither on the tokens beside it nor on the size of the grid.
#pragma once
#include <dsv4/bulk.cuh>
#include <dsv4/dependent.cuh>
#include <dsv4/half.cuh>
#include <dsv4/mma.cuh>
#include <dsv4/moe_job.cuh>

namespace dsv4::moe {

constexpr int MAX_STAGES = 6;

// A lane's columns of token g, scaled over the slice that the four lanes of g hold. Returns what undoes the scaling.
template <int BLOCKS>
__device__ __forceinline__ float load_slice(uint32_t (&x)[BLOCKS][8], const bf16* row, int left, int blocks) {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) {
        const bool there = row != nullptr && i < blocks && 64 * i < left;  // columns are whole groups of 16
        const uint4 zeros = {0, 0, 0, 0}, *at = reinterpret_cast<const uint4*>(row + 64 * i);
        const uint4 low = there ? at[0] : zeros, high = there ? at[1] : zeros;
        x[i][0] = low.x, x[i][1] = low.y, x[i][2] = low.z, x[i][3] = low.w;
        x[i][4] = high.x, x[i][5] = high.y, x[i][6] = high.z, x[i][7] = high.w;
#pragma unroll
        for (int k = 0; k < 8; ++k) most = magnitudes(most, x[i][k]);
    }
    uint32_t largest = max(most & 0xFFFFu, most >> 16);
    largest = max(largest, __shfl_xor_sync(ALL, largest, 1));
    largest = max(largest, __shfl_xor_sync(ALL, largest, 2));
    const int shift = f16_shift(largest);
    const float factor = power_of_two(shift);
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i)
#pragma unroll
        for (int k = 0; k < 8; ++k) x[i][k] = to_f16(x[i][k], factor);
    return power_of_two(-shift);
}

template <bool FIRST, int SLICES, int BLOCKS>
__global__ void __launch_bounds__(SLICES * 32, 16 / SLICES) stream(Job job, int stages) {
    extern __shared__ __align__(128) uint8_t rings[];
    __shared__ float4 parts[2][SLICES][32];
    __shared__ uint64_t barriers[SLICES][MAX_STAGES];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = warp * job.blocks / SLICES, blocks = (warp + 1) * job.blocks / SLICES - first;
    const uint32_t stage_bytes = (job.blocks + SLICES - 1) / SLICES * w4::BLOCK_BYTES;
    const uint8_t* ring = rings + warp * stages * stage_bytes;
    const uint32_t ring_address = shared_address(ring), barrier = shared_address(barriers[warp]);
    if (lane == 0) {
        for (int s = 0; s < stages; ++s) barrier_init(barrier + 8 * s, 1);
        barriers_ready();
    }
    __syncwarp();
    wait_for_previous();  // also the second projection: who is in front of it may be align itself
    let_next_start();
    const int64_t total = static_cast<int64_t>(__ldcg(job.plan.count)) * job.rows;
    const int begin = total * blockIdx.x / gridDim.x, end = total * (blockIdx.x + 1) / gridDim.x;
    const auto fetch = [&](int tile, int stage) {
        const int group = tile / job.rows, row = tile - group * job.rows;
        const int64_t at = (group_at(job.plan, group).expert * static_cast<int64_t>(job.rows) + row) * job.blocks;
        bulk_load(ring_address + stage * stage_bytes, job.tiles + (at + first) * w4::BLOCK_BYTES,
                  blocks * w4::BLOCK_BYTES, barrier + 8 * stage);
    };
    if (lane == 0 && blocks > 0)
        for (int s = 0; s < stages && begin + s < end; ++s) fetch(begin + s, s);

    // The element of a tile that this thread finishes: token m, row `row`, or `row` of gate (half 0) and up (half 1).
    const int l = warp % 4 * 8 + lane / 4, row = l / 4, half = lane / 2 % 2, m = 2 * (l % 4) + lane % 2;
    uint32_t x[BLOCKS][8];
    float undo[2], alpha = 0.0f, row_scale = 1.0f, weight = 1.0f;
    int held = -2, place = -1, stage = 0, phase = 0, group = begin / job.rows, r = begin - group * job.rows;
    bool fresh = true;
    for (int tile = begin; tile < end; ++tile) {
        if (fresh) {
            const Group now = group_at(job.plan, group);
            const int from = g < now.count ? source<FIRST>(job, now.first + g) : -1;
            if (!__all_sync(ALL, from == held)) {
                const int column = first * 64 + 16 * t;
                const bf16* at = from < 0 ? nullptr : job.x + from * job.x_row + column;
                const float back = load_slice(x, at, job.columns - column, blocks);
                undo[0] = __shfl_sync(ALL, back, 8 * t), undo[1] = __shfl_sync(ALL, back, 8 * t + 4);
                held = from;
            }
            place = m < now.count ? now.first + m : -1;
            alpha = alpha_of<FIRST>(job, now.expert, half);
            if (place >= 0 && job.row_scale != nullptr) row_scale = job.row_scale[source<FIRST>(job, place)];
            if (FIRST && place >= 0) weight = job.weights[__ldcg(job.plan.pairs + place)];
        }
        float even[4] = {}, odd[4] = {};
        if (blocks > 0) {
            barrier_wait(barrier + 8 * stage, phase);
            const uint8_t* block = ring + stage * stage_bytes;
#pragma unroll
            for (int i = 0; i < BLOCKS; ++i) {
                if (i >= blocks) break;
                const w4::Lane part = w4::load(block + i * w4::BLOCK_BYTES, lane);
                const uint32_t words[4] = {part.codes.x, part.codes.y, part.codes.z, part.codes.w};
                uint32_t scale, scale8, a[4];
                w4::scales(part.scales, scale, scale8);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    w4::dequantize(a, words[j], scale, scale8);
                    mma_f16(j % 2 ? odd : even, a, x[i][2 * j], x[i][2 * j + 1]);
                }
            }
            __syncwarp();
            if (lane == 0 && tile + stages < end) fetch(tile + stages, stage);
            if (++stage == stages) stage = 0, phase ^= 1;
        }
        const int buffer = (tile - begin) % 2;
        parts[buffer][warp][lane] = make_float4((even[0] + odd[0]) * undo[0], (even[1] + odd[1]) * undo[1],
                                                (even[2] + odd[2]) * undo[0], (even[3] + odd[3]) * undo[1]);
        __syncthreads();
        if (warp / 4 == (tile - begin) % (SLICES / 4)) {  // the quarters of the block take turns
            float sum = 0.0f;
#pragma unroll
            for (int s = 0; s < SLICES; ++s)
                sum += reinterpret_cast<const float*>(parts[buffer][s])[4 * l + 2 * half + lane % 2];
            sum = sum * alpha * row_scale;
            if constexpr (FIRST) {
                const float up = __shfl_xor_sync(ALL, sum, 2);
                if (half == 0 && place >= 0)
                    job.out[static_cast<int64_t>(place) * 8 * job.rows + 8 * r + row] =
                        activated(sum, up, job.limit, weight);
            } else if (place >= 0) {
                job.out[static_cast<int64_t>(place) * 16 * job.rows + 16 * r + row + 8 * half] = from_float<bf16>(sum);
            }
        }
        fresh = ++r == job.rows;
        if (fresh) r = 0, ++group;
    }
}

}  // namespace dsv4::moe
