// Many tokens: a block multiplies 256 rows of an expert with up to 64 of its tokens, two 16-row tiles per warp. The
// columns of all tokens pass through shared memory 64 at a time, three steps ahead; each warp reads its own weights one
// step ahead. A token's result depends on the token and the expert alone (its columns are summed in their order), but
// that order is not the one of moe_stream.cuh.
#pragma once
#include <dsv4/bulk.cuh>
#include <dsv4/half.cuh>
#include <dsv4/mma.cuh>
#include <dsv4/moe_job.cuh>

namespace dsv4::moe {

constexpr int WIDE_TOKENS = 64, WARP_TILES = 2, TILE_WARPS = 8, STEPS = 4, TOKEN_TILES = WIDE_TOKENS / 8;
constexpr int STEP_ROW = 64 + 8;  // an odd multiple of 16 bytes: eight tokens meet no bank conflict
constexpr int BLOCK_TILES = WARP_TILES * TILE_WARPS;

// Rows of BF16 to FP16 with one power of two each, padded with zeros to whole blocks of 64 columns; `scale` takes what
// undoes it, times the row's own factor. A block per row.
__global__ void __launch_bounds__(256) to_half(const bf16* x, int64_t x_row, const float* row_scale, int columns,
                                               int blocks, uint16_t* half, float* scale) {
    __shared__ uint32_t parts[8];
    const int64_t row = blockIdx.x;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(x + row * x_row);
    uint32_t most = 0;
    for (int i = threadIdx.x; i < columns / 2; i += 256) most = magnitudes(most, from[i]);
    const uint32_t warp_most = __reduce_max_sync(0xffffffffu, max(most & 0xFFFFu, most >> 16));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = warp_most;
    __syncthreads();
    const int shift = f16_shift(__reduce_max_sync(0xffffffffu, parts[threadIdx.x % 8]));
    const float factor = power_of_two(shift);
    uint32_t* to = reinterpret_cast<uint32_t*>(half) + row * blocks * 32;
    for (int i = threadIdx.x; i < blocks * 32; i += 256) to[i] = i < columns / 2 ? to_f16(from[i], factor) : 0u;
    if (threadIdx.x == 0) scale[row] = power_of_two(-shift) * (row_scale == nullptr ? 1.0f : row_scale[row]);
}

__device__ __forceinline__ void copy_piece(void* to, const void* from) {  // 16 bytes, asynchronously
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

template <bool VALUE>
struct Full {
    static constexpr bool value = VALUE;
};

template <bool FIRST>
__global__ void __launch_bounds__(TILE_WARPS * 32, 2) tiles(Job job, const uint16_t* half, const float* scale) {
    __shared__ __align__(16) uint16_t steps[STEPS][WIDE_TOKENS][STEP_ROW];
    __shared__ float factors[WIDE_TOKENS], weights[WIDE_TOKENS];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const int across = (job.rows + BLOCK_TILES - 1) / BLOCK_TILES;
    const int index = blockIdx.x / across;
    if (index >= *job.plan.count) return;
    const Group now = group_at(job.plan, index);
    const int first_tile = blockIdx.x % across * BLOCK_TILES + warp * WARP_TILES;
    const int token_tiles = (now.count + 7) / 8;

    // Two pieces of 16 bytes per thread and step: token thread / 8 (and 32 further), piece thread % 8.
    const uint16_t* from[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int token = min(thread / 8 + 32 * i, now.count - 1);  // beyond the last: any, nobody reads the result
        from[i] = half + static_cast<int64_t>(source<FIRST>(job, now.first + token)) * job.blocks * 64 + thread % 8 * 8;
    }
    const auto bring = [&](int block) {
        if (block < job.blocks) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
                copy_piece(&steps[block % STEPS][thread / 8 + 32 * i][thread % 8 * 8], from[i] + block * 64);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    const uint8_t* rows[WARP_TILES];
#pragma unroll
    for (int i = 0; i < WARP_TILES; ++i) {
        const int64_t tile = static_cast<int64_t>(now.expert) * job.rows + min(first_tile + i, job.rows - 1);
        rows[i] = job.tiles + tile * job.blocks * w4::BLOCK_BYTES;
    }
    w4::Lane ahead[WARP_TILES];
    const auto read = [&](int block) {
        if (block >= job.blocks) return;
#pragma unroll
        for (int i = 0; i < WARP_TILES; ++i) ahead[i] = w4::load(rows[i] + block * w4::BLOCK_BYTES, lane);
    };
#pragma unroll
    for (int s = 0; s < STEPS - 1; ++s) bring(s);
    read(0);
    if (thread < now.count) {
        factors[thread] = scale[source<FIRST>(job, now.first + thread)];
        weights[thread] = FIRST ? job.weights[job.plan.pairs[now.first + thread]] : 1.0f;
    }

    float sums[WARP_TILES][TOKEN_TILES][4] = {};
    // `full`: all tokens are there, known when compiling, so that nothing stands between the products.
    const auto multiply = [&](int block, const w4::Lane (&part)[WARP_TILES], auto full) {
        const auto* step = steps[block % STEPS];
        uint32_t scales[WARP_TILES][2];
#pragma unroll
        for (int i = 0; i < WARP_TILES; ++i) w4::scales(part[i].scales, scales[i][0], scales[i][1]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // products 0 and 1, then 2 and 3
            uint32_t a[WARP_TILES][2][4];
#pragma unroll
            for (int i = 0; i < WARP_TILES; ++i) {
                w4::dequantize(a[i][0], h ? part[i].codes.z : part[i].codes.x, scales[i][0], scales[i][1]);
                w4::dequantize(a[i][1], h ? part[i].codes.w : part[i].codes.y, scales[i][0], scales[i][1]);
            }
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {
                if (!full.value && n >= token_tiles) break;
                const uint4 b = *reinterpret_cast<const uint4*>(&step[8 * n + g][16 * t + 8 * h]);
#pragma unroll
                for (int i = 0; i < WARP_TILES; ++i) {
                    mma_f16(sums[i][n], a[i][0], b.x, b.y);
                    mma_f16(sums[i][n], a[i][1], b.z, b.w);
                }
            }
        }
    };
    const auto run = [&](auto full) {
        for (int block = 0; block < job.blocks; ++block) {
            asm volatile("cp.async.wait_group %0;" ::"n"(STEPS - 2) : "memory");
            __syncthreads();
            bring(block + STEPS - 1);
            w4::Lane part[WARP_TILES];
#pragma unroll
            for (int i = 0; i < WARP_TILES; ++i) part[i] = ahead[i];
            read(block + 1);
            multiply(block, part, full);
        }
    };
    if (token_tiles == TOKEN_TILES)
        run(Full<true>());
    else
        run(Full<false>());

    const float alpha[2] = {alpha_of<FIRST>(job, now.expert, 0), alpha_of<FIRST>(job, now.expert, FIRST)};
#pragma unroll
    for (int i = 0; i < WARP_TILES; ++i) {
        const int tile = first_tile + i;
        if (tile >= job.rows) break;
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int token = 8 * n + 2 * t + c;
                if (token >= now.count) continue;
                const int64_t place = now.first + token;
                const float low = sums[i][n][c] * alpha[0] * factors[token];
                const float high = sums[i][n][c + 2] * alpha[1] * factors[token];
                if constexpr (FIRST) {
                    job.out[place * 8 * job.rows + 8 * tile + g] = activated(low, high, job.limit, weights[token]);
                } else {
                    bf16* out = job.out + place * 16 * job.rows + 16 * tile + g;
                    out[0] = from_float<bf16>(low), out[8] = from_float<bf16>(high);
                }
            }
        }
    }
}

}  // namespace dsv4::moe
