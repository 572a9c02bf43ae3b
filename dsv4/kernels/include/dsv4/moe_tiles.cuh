// Many tokens: a block multiplies a chain of sections of an expert, 256 rows each, with up to 128 of its tokens, two
// 16-row tiles per warp. Tokens and weights pass through a ring in shared memory, a step of 64 columns at a time, asked
// for across the ends of sections; a warp unpacks half a step while the products of the other half are in flight. A token's result depends on the token and the expert alone
// (its columns are summed in their order), but that order is not the one of moe_stream.cuh.
#pragma once
#include <dsv4/bulk.cuh>
#include <dsv4/half.cuh>
#include <dsv4/moe_job.cuh>
#include <dsv4/wide_product.cuh>

namespace dsv4::moe {

constexpr int WIDE_TOKENS = 8 * wide::MOST_TILES, WARP_TILES = 2, TILE_WARPS = 8, TILE_THREADS = TILE_WARPS * 32;
constexpr int BLOCK_TILES = WARP_TILES * TILE_WARPS, COPIES = WIDE_TOKENS * 8 / TILE_THREADS;
constexpr int STEP_TOKENS = WIDE_TOKENS * 128, STEP_WARP = WARP_TILES * w4::BLOCK_BYTES;
constexpr int STEP_BYTES = STEP_TOKENS + TILE_WARPS * STEP_WARP;
static_assert(STEP_BYTES % 1024 == 0);
constexpr int LEAST_STEPS = 3, MOST_STEPS = 7;  // of the ring: one is read, one may be, the others are asked for
constexpr int OUT_ROW = WARP_TILES * 32 + 16;   // a token's results of a warp, and 16 bytes against bank conflicts
constexpr int OUT_TOKENS = 16, OUT_WARP = OUT_TOKENS * OUT_ROW;

constexpr int tiles_bytes(int steps) { return steps * STEP_BYTES + TILE_WARPS * OUT_WARP + 1024; }  // and to align

// Rows of BF16 to FP16 with one power of two each, padded with zeros to whole blocks of 64 columns, in the order of
// wide_product.cuh; `scale` takes what undoes it, times the row's own factor. A block per row.
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
    for (int i = threadIdx.x; i < blocks * 32; i += 256) {
        const int pair = i / 32 * 32 + wide::column_pair(i % 32);
        to[i] = pair < columns / 2 ? to_f16(from[pair], factor) : 0u;
    }
    if (threadIdx.x == 0) scale[row] = power_of_two(-shift) * (row_scale == nullptr ? 1.0f : row_scale[row]);
}

// What a thread asks for, step by step: its pieces of the tokens, and of its warp's weights.
struct Feed {
    const uint8_t* codes;  // of the first tile
    int block, tile;
    int to_second, to_scales;  // bytes to the second tile's codes; lanes 0 .. 7: to the scales of either

    __device__ __forceinline__ void open(const Job& job, int expert) {
        const int lane = threadIdx.x % 32, length = job.blocks * w4::BLOCK_BYTES;
        const int64_t first = static_cast<int64_t>(expert) * job.rows + min(tile, job.rows - 1);
        to_second = tile + 1 < job.rows ? length : 0;  // beyond the last: any, nobody reads the result
        to_scales = (lane >= 4 ? to_second : 0) + w4::CODE_BYTES + lane % 4 * 16 - lane * 16;
        codes = job.tiles + first * length + lane * 16;
        block = 0;
    }
    // to: the warp's weights in a step of the ring.
    __device__ __forceinline__ void bring(uint32_t to) {
        const int lane = threadIdx.x % 32;
        start_copy16(to + lane * 16, codes);
        start_copy16(to + w4::BLOCK_BYTES + lane * 16, codes + to_second);
        if (lane < 8) start_copy16(to + lane / 4 * w4::BLOCK_BYTES + w4::CODE_BYTES + lane % 4 * 16, codes + to_scales);
        codes += w4::BLOCK_BYTES, ++block;
    }
};

// Two 8 x 8 matrices, rows of the lane's g and tokens 2 t, 2 t + 1 in a register, to shared memory token by token. at:
// lanes 0 .. 7 and 8 .. 15: where a token's eight rows of the first and of the second go.
__device__ __forceinline__ void store_turned(uint32_t at, uint32_t first, uint32_t second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(first), "r"(second)
                 : "memory");
}

__device__ __forceinline__ uint32_t pair_of(bf16 low, bf16 high) {
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

template <int VALUE>
struct Constant {
    static constexpr int value = VALUE;
};

// run(Constant<NT>): the smallest even NT that holds `tiles` n-tiles.
template <int NT = 2, typename Run>
__device__ __forceinline__ void with_tiles(int tiles, Run&& run) {
    if constexpr (NT < wide::MOST_TILES) {
        if (tiles > NT) return with_tiles<NT + 2>(tiles, run);
    }
    run(Constant<NT>());
}

// A warp's sums of two tiles from `tile` on to where they belong, through `room` [16 tokens] in shared memory.
template <bool FIRST, int NT>
__device__ __forceinline__ void finish(const Job& job, const Group& now, int tile, float (&sums)[WARP_TILES][NT][4],
                                       const float (&alpha)[2], const float* factors, const float* weights,
                                       uint8_t* room) {
    constexpr int PIECES = FIRST ? WARP_TILES : 2 * WARP_TILES, OWNERS = 32 / PIECES;  // 16 bytes each, of a token
    const int lane = threadIdx.x % 32, t = lane % 4, own = lane / PIECES, piece = lane % PIECES;
    const uint32_t to = shared_address(room) + lane % 8 * OUT_ROW + lane / 8 % 2 * 16;
    const int64_t row = static_cast<int64_t>(now.first + own) * job.rows + tile;
    uint4* out = reinterpret_cast<uint4*>(job.out) + row * PIECES / WARP_TILES + piece;
    const int count = tile + piece * WARP_TILES / PIECES < job.rows ? now.count : 0;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        const int token = 8 * n + 2 * t;
        const uint32_t place = to + n % 2 * 8 * OUT_ROW;
        const auto value = [&](int i, int k) { return sums[i][n][k] * alpha[k / 2] * factors[token + k % 2]; };
        if constexpr (FIRST) {
            const auto pair = [&](int i) {
                return pair_of(activated(value(i, 0), value(i, 2), job.limit, weights[token]),
                               activated(value(i, 1), value(i, 3), job.limit, weights[token + 1]));
            };
            store_turned(place, pair(0), pair(1));
        } else {
            const auto pair = [&](int i, int k) {
                return pair_of(from_float<bf16>(value(i, k)), from_float<bf16>(value(i, k + 1)));
            };
#pragma unroll
            for (int i = 0; i < WARP_TILES; ++i) store_turned(place + 32 * i, pair(i, 0), pair(i, 2));
        }
        if (n % 2 == 0) continue;
        __syncwarp();
#pragma unroll
        for (int first = 0; first < OUT_TOKENS; first += OWNERS, out += 16 * job.rows)
            if (8 * (n - 1) + first + own < count)
                *out = *reinterpret_cast<const uint4*>(room + (first + own) * OUT_ROW + piece * 16);
        __syncwarp();
    }
}

template <bool FIRST>
__global__ void __launch_bounds__(TILE_THREADS, 1)
    tiles(const __grid_constant__ Job job, const uint16_t* half, const float* scale, int chain, int steps) {
    extern __shared__ uint8_t memory[];
    __shared__ float factors[WIDE_TOKENS], weights[WIDE_TOKENS];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int sections = (job.rows + BLOCK_TILES - 1) / BLOCK_TILES, across = (sections + chain - 1) / chain;
    const int index = blockIdx.x / across, first_section = blockIdx.x % across * chain;
    if (index >= *job.plan.count) return;
    const Group now = group_at(job.plan, index);
    uint8_t* const base = memory + (1024 - shared_address(memory) % 1024) % 1024;  // [steps] steps, [8 warps] results
    const uint32_t ring = shared_address(base);

    Feed feed;
    feed.tile = first_section * BLOCK_TILES + warp * WARP_TILES;
    feed.open(job, now.expert);
    int from[COPIES];  // the rows of tokens thread / 8 + 32 i; of each, piece thread % 8
#pragma unroll
    for (int i = 0; i < COPIES; ++i)
        from[i] = source<FIRST>(job, now.first + min(thread / 8 + 32 * i, now.count - 1));
    int left = min(sections - first_section, chain) * job.blocks, asked = 0, at = 0;  // the latter of the ring
    const auto bring = [&] {
        if (left-- > 0) {
            const uint32_t to = ring + asked * STEP_BYTES;
#pragma unroll
            for (int i = 0; i < COPIES; ++i) {
                const int64_t block = static_cast<int64_t>(from[i]) * job.blocks + feed.block;
                if (thread / 8 + 32 * i < now.count)
                    start_copy16(to + wide::piece_at(thread / 8, thread % 8) + i * 32 * 128,
                                 half + block * 64 + thread % 8 * 8);
            }
            feed.bring(to + STEP_TOKENS + warp * STEP_WARP);
            if (feed.block == job.blocks) feed.tile += BLOCK_TILES, feed.open(job, now.expert);
            if (++asked == steps) asked = 0;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    for (int s = 0; s < steps - 2; ++s) bring();
    if (thread < now.count) {
        factors[thread] = scale[source<FIRST>(job, now.first + thread)];
        weights[thread] = FIRST ? job.weights[job.plan.pairs[now.first + thread]] : 1.0f;
    }

    with_tiles((now.count + 7) / 8, [&](auto n_tiles) {
        constexpr int NT = decltype(n_tiles)::value;
        w4::Lane part[WARP_TILES];
        uint32_t a[2][WARP_TILES][2][4];  // halves of a step
        const auto unpack = [&](auto which) {
            constexpr int h = decltype(which)::value;
#pragma unroll
            for (int i = 0; i < WARP_TILES; ++i) {
                uint32_t low, high;
                w4::scales(part[i].scales, low, high);
                w4::dequantize(a[h][i][0], h ? part[i].codes.z : part[i].codes.x, low, high);
                w4::dequantize(a[h][i][1], h ? part[i].codes.w : part[i].codes.y, low, high);
            }
        };
        const auto begin = [&] {  // of the step `at`: its weights and half of them unpacked; its tokens after a barrier
            if (steps == MOST_STEPS) asm volatile("cp.async.wait_group %0;" ::"n"(MOST_STEPS - 3) : "memory");
            else asm volatile("cp.async.wait_group 0;" ::: "memory");
            wide::publish();
            __syncwarp();
            const uint8_t* own = base + at * STEP_BYTES + STEP_TOKENS + warp * STEP_WARP;
#pragma unroll
            for (int i = 0; i < WARP_TILES; ++i) part[i] = w4::load(own + i * w4::BLOCK_BYTES, lane);
            unpack(Constant<0>());
        };
        begin();
        for (int section = first_section; section < min(first_section + chain, sections); ++section) {
            float sums[WARP_TILES][NT][4] = {};
            for (int block = 0; block < job.blocks; ++block) {
                const uint32_t step = ring + at * STEP_BYTES;
                __syncthreads();
                wide::multiply<NT>(sums, a[0], step, 0);
                wide::settle<1>();  // so the step before is read, and by others the one before that
                bring();
                unpack(Constant<1>());
                wide::multiply<NT>(sums, a[1], step, 1);
                wide::settle<1>();
                if (++at == steps) at = 0;
                begin();
            }
            wide::settle<0>();
            wide::take(sums);

            const float alpha[2] = {alpha_of<FIRST>(job, now.expert, 0), alpha_of<FIRST>(job, now.expert, FIRST)};
            finish<FIRST>(job, now, section * BLOCK_TILES + warp * WARP_TILES, sums, alpha, factors, weights,
                          base + steps * STEP_BYTES + warp * OUT_WARP);
        }
    });
}

}  // namespace dsv4::moe
