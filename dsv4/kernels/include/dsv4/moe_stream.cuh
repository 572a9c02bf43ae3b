// Few tokens: every byte of the active experts is read once, and reading is all the time there is.
// A block takes steps of TILES tiles of 16 rows one after the other. One copy of the copy engine brings a step whole
// into a ring of stages, across the ends of groups of tokens. The warps share a tile's columns and keep theirs of up
// to 8 tokens in registers, as FP16 scaled by a power of two per token (half.cuh), until the group changes; between
// two steps of a group nothing is loaded from memory. The warps' sums are added in their order, so a token's result
// depends neither on the tokens beside it nor on the size of the grid.
#pragma once
#include <type_traits>
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

// What a block has asked for: the tiles of a group in their order, then those of the next.
template <int TILES>
struct Asked {
    const uint8_t* from;
    int group, row;

    __device__ __forceinline__ void open(const Job& job, int now, int at) {
        const int64_t tile = group_at(job.plan, now).expert * static_cast<int64_t>(job.rows) + at;
        from = job.tiles + tile * job.blocks * w4::BLOCK_BYTES;
        group = now, row = at;
    }
    __device__ __forceinline__ void ask(const Job& job, uint32_t to, uint32_t barrier) {
        if (row >= job.rows) open(job, group + 1, 0);
        const int bytes = min(TILES, job.rows - row) * job.blocks * w4::BLOCK_BYTES;
        bulk_load(to, from, bytes, barrier);
        from += bytes, row += TILES;
    }
};

// planned: the plan was there before the kernel in front of this one began, so the first weights need not wait for it.
template <bool FIRST, int SLICES, int BLOCKS, int TILES>
__global__ void __launch_bounds__(SLICES * 32, 16 / SLICES) stream(Job job, int stages, bool planned) {
    constexpr int QUARTERS = SLICES / 4;
    static_assert(TILES <= QUARTERS);  // each finishes a tile of a step at most
    extern __shared__ __align__(128) uint8_t ring[];
    __shared__ float4 parts[2][TILES][SLICES][32];
    __shared__ uint64_t barriers[MAX_STAGES];
    __shared__ Asked<TILES> asked;  // of one thread, which would hold it in registers of all
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = warp * job.blocks / SLICES, blocks = (warp + 1) * job.blocks / SLICES - first;
    const int tile_bytes = job.blocks * w4::BLOCK_BYTES;
    const uint32_t ring_address = shared_address(ring), barrier = shared_address(barriers);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int s = 0; s < MAX_STAGES; ++s) barrier_init(barrier + 8 * s, 1);
        barriers_ready();
    }
    if (!planned) wait_for_previous();
    const int steps = (job.rows + TILES - 1) / TILES, total = __ldcg(job.plan.count) * steps;
    const int each = total / gridDim.x, more = total - each * gridDim.x, block = blockIdx.x;
    const int begin = each * block + min(block, more), end = begin + each + (block < more);
    int group = begin / steps, row = (begin - group * steps) * TILES;
    if (threadIdx.x == 0 && begin < end) {
        asked.open(job, group, row);
#pragma unroll 1
        for (int s = 0; s < stages && begin + s < end; ++s)
            asked.ask(job, ring_address + s * TILES * tile_bytes, barrier + 8 * s);
    }
    if (planned) wait_for_previous();
    let_next_start();
    __syncthreads();

    // The element of a tile that this thread finishes: token m, row `mine`, or `mine` of gate (half 0) and up (half 1).
    const int l = warp % 4 * 8 + lane / 4, mine = l / 4, half = lane / 2 % 2, m = 2 * (l % 4) + lane % 2;
    uint32_t x[BLOCKS][8];
    float undo[2], alpha = 0.0f, row_scale = 1.0f, weight = 1.0f;
    int place = -1, stage = 0, phase = 0;
    bool fresh = true;
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
        if (fresh) {
            const Group now = group_at(job.plan, group);
            const int from = g < now.count ? source<FIRST>(job, now.first + g) : -1;
            const int column = first * 64 + 16 * t;
            const bf16* at = from < 0 ? nullptr : job.x + from * job.x_row + column;
            const float back = load_slice(x, at, job.columns - column, blocks);
            undo[0] = __shfl_sync(ALL, back, 8 * t), undo[1] = __shfl_sync(ALL, back, 8 * t + 4);
            place = m < now.count ? now.first + m : -1;
            alpha = alpha_of<FIRST>(job, now.expert, half);
            if (place >= 0 && job.row_scale != nullptr) row_scale = job.row_scale[source<FIRST>(job, place)];
            if (FIRST && place >= 0) weight = job.weights[__ldcg(job.plan.pairs + place)];
        }
        const int buffer = step & 1, tiles = min(TILES, job.rows - row);
        const uint8_t* slice = ring + stage * TILES * tile_bytes + first * w4::BLOCK_BYTES;
        const auto multiply = [&](auto whole) {
            constexpr bool WHOLE = decltype(whole)::value;  // all tiles, all blocks, and so nothing to decide
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                if (!WHOLE && tile >= tiles) break;
                float even[4] = {}, odd[4] = {};
#pragma unroll
                for (int i = 0; i < BLOCKS; ++i) {
                    if (!WHOLE && i >= blocks) break;
                    const w4::Lane part = w4::load(slice + tile * tile_bytes + i * w4::BLOCK_BYTES, lane);
                    const uint32_t words[4] = {part.codes.x, part.codes.y, part.codes.z, part.codes.w};
                    uint32_t scale, scale8, a[4];
                    w4::scales(part.scales, scale, scale8);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        w4::dequantize(a, words[j], scale, scale8);
                        mma_f16(j % 2 ? odd : even, a, x[i][2 * j], x[i][2 * j + 1]);
                    }
                }
                parts[buffer][tile][warp][lane] =
                    make_float4((even[0] + odd[0]) * undo[0], (even[1] + odd[1]) * undo[1],
                                (even[2] + odd[2]) * undo[0], (even[3] + odd[3]) * undo[1]);
            }
        };
        barrier_wait(barrier + 8 * stage, phase);
        if (BLOCKS <= 4 && blocks == BLOCKS && tiles == TILES)  // more blocks hide each other's latency
            multiply(std::true_type());
        else
            multiply(std::false_type());
        __syncthreads();
        if (threadIdx.x == 0 && step + stages < end)
            asked.ask(job, ring_address + stage * TILES * tile_bytes, barrier + 8 * stage);
        if (++stage == stages) stage = 0, phase ^= 1;
        const int tile = (warp / 4 + step) & (QUARTERS - 1);  // the quarters of the block take turns
        if (tile < tiles) {
            float sum = 0.0f;
#pragma unroll
            for (int s = 0; s < SLICES; ++s)
                sum += reinterpret_cast<const float*>(parts[buffer][tile][s])[4 * l + 2 * half + lane % 2];
            sum = sum * alpha * row_scale;
            if constexpr (FIRST) {
                const float up = __shfl_xor_sync(ALL, sum, 2);
                if (half == 0 && place >= 0)
                    job.out[(static_cast<int64_t>(place) * job.rows + row + tile) * 8 + mine] =
                        activated(sum, up, job.limit, weight);
            } else if (place >= 0) {
                job.out[(static_cast<int64_t>(place) * job.rows + row + tile) * 16 + mine + 8 * half] =
                    from_float<bf16>(sum);
            }
        }
        row += TILES;
        fresh = row >= job.rows;
        if (fresh) row = 0, ++group;
    }
}

}  // namespace dsv4::moe
