// linear: every projection of an input in one or two launches, for up to 64 tokens at a time.
//
// Blocks are persistent, one per processor; each warp streams its own weights through a ring of bulk copies and nobody
// waits for another warp to load, nor for the kernel in front: weights are asked for before it has ended. Tokens are
// staged once per block (or per slice, where they are many): scaled FP16 for NVFP4 and FP8 weights, BF16 for BF16
// weights. Three ways of spreading tiles (16 rows x K) and their slices:
//   OWN    many tiles: a warp takes whole tiles and keeps the sum of the slices in registers; of more than eight tokens, a
//          kernel in front makes what all blocks stage, but of up to sixteen with few columns
//   MEET   few tiles, up to eight tokens: a cluster takes whole tiles, its blocks and their warps the slices; sums meet
//          in shared memory
//   SPLIT  few tiles, more tokens: blocks take slices; sums meet in `partials`, and a second kernel adds them up: whoever
//          came last would read alone what all have written
// Up to eight tokens have a kernel of their own (linear_few.cuh), more have another (linear_many.cuh).
#include <dsv4/linear_few.cuh>
#include <dsv4/linear_many.cuh>

#include <algorithm>

using namespace dsv4;
using namespace dsv4::linear;

namespace {

enum Mode : int { OWN = 0, MEET = 1, SPLIT = 2, DENSE = 3, ROUND = 4 };  // the codes of kernels/linear/schedule.py

__device__ __forceinline__ const Part& part_of(const Parts& parts, int tile) {
    int which = 0;
    while (which + 1 < parts.count && tile >= parts.part[which + 1].first_tile) ++which;
    return parts.part[which];
}

// SPLIT: adds up the slices in their order. One warp per tile and eight tokens.
constexpr int SUM_THREADS = 256, SUM_AHEAD = 16;  // loads in flight
__global__ void __launch_bounds__(SUM_THREADS) sum_kernel(const __grid_constant__ Many task, int groups) {
    let_next_start();
    const int used = (task.tokens + 7) / 8, at = blockIdx.x * SUM_THREADS + threadIdx.x;
    const int lane = at % 32, n = at / 32 % used, tile = at / 32 / used, token = 8 * n + lane % 4 * 2;
    const Part& part = part_of(task.parts, min(tile, task.parts.tiles - 1));
    const int row = (tile - part.first_tile) * TILE_ROWS, slices = token < task.tokens ? task.slices : 0;
    const float4* from = reinterpret_cast<const float4*>(task.partials);
    from += (static_cast<int64_t>(tile) * task.slices * groups + n) * 32 + lane;
    const bool whole = whole_rows(part, row);
    all_at_hand(from, slices, row, whole, part.out, part.out_stride, part.row_scale, part.alpha);
    wait_for_previous();
    if (tile >= task.parts.tiles) return;
    float sum[4] = {};
    for (int first = 0; first < slices; first += SUM_AHEAD) {
        float4 v[SUM_AHEAD];
#pragma unroll
        for (int i = 0; i < SUM_AHEAD; ++i)
            if (first + i < slices) v[i] = __ldcg(from + (first + i) * groups * 32);
#pragma unroll
        for (int i = 0; i < SUM_AHEAD; ++i)
            if (first + i < slices) sum[0] += v[i].x, sum[1] += v[i].y, sum[2] += v[i].z, sum[3] += v[i].w;
    }
    __syncwarp();
    if (whole) {
        const Eight eight(part, row, task.tokens);
        eight.scale(8 * n, sum);
        eight.put(8 * n, sum);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (token + i % 2 < task.tokens) put(part, row + lane / 4 + i / 2 * 8, token + i % 2, sum[i]);
}

template <int NT, bool SPLIT>
cudaError_t run(const Many& task, int grid, size_t shared_bytes, cudaStream_t stream) {
    auto kernel = linear_many<NT, SPLIT>;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
    if (!SPLIT && task.staged != nullptr) {
        const int64_t rows = static_cast<int64_t>(task.inputs) * task.slices * task.tokens;
        error = launch_dependent(stage_tokens<NT>, (rows + STAGE_WARPS - 1) / STAGE_WARPS, 1, STAGE_WARPS * 32, 0, stream,
                                 task);
        if (error != cudaSuccess) return error;
    }
    error = launch_dependent(kernel, grid, 1, MANY_THREADS, shared_bytes, stream, task);
    if (!SPLIT || error != cudaSuccess) return error;
    const int64_t threads = static_cast<int64_t>(task.parts.tiles) * ((task.tokens + 7) / 8) * 32;
    return launch_dependent(sum_kernel, (threads + SUM_THREADS - 1) / SUM_THREADS, 1, SUM_THREADS, 0, stream, task, NT);
}

// DENSE, for cuBLAS: the parts' values as BF16 [N, K], their scales left out. One warp per block of 16 x 64.
__global__ void __launch_bounds__(256) dense_kernel(const __grid_constant__ Parts parts, int blocks, int columns) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
    if (at >= static_cast<int64_t>(parts.tiles) * blocks) return;
    const Part& part = part_of(parts, at / blocks);
    const int lane = threadIdx.x % 32, tile = at / blocks - part.first_tile;
    const int column = at % blocks * BLOCK_COLUMNS + lane % 4 * 16;
    const uint8_t* block = part.tiles + (static_cast<int64_t>(tile) * blocks + at % blocks) * block_bytes(part.format);
    float scale = w4::UNDO;
    if (part.format == FP8)
        scale = part.block_scale[(part.first_row + tile * TILE_ROWS) / 128 * part.scale_columns + column / 128];
    uint32_t a[4][4];
    if (part.format == NVFP4) nvfp4_operands(a, w4::load(block, lane));
    else if (part.format == FP8) fp8_operands(a, block + lane * 16);
    else plain_operands(a, block + lane * 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = tile * TILE_ROWS + lane / 4 + half * 8;
        uint32_t pairs[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            pairs[i] = a[i / 2][i % 2 * 2 + half];
            if (part.format != PLAIN) pairs[i] = f16x2_to_bf16x2(pairs[i], scale);
        }
        bf16* to = static_cast<bf16*>(part.out) + row * part.out_stride + column;
        if (row >= part.rows) continue;
        if (columns % 16 == 0) {
            if (column >= columns) continue;
            reinterpret_cast<uint4*>(to)[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            reinterpret_cast<uint4*>(to)[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
        } else {
#pragma unroll
            for (int i = 0; i < 16; ++i)
                if (column + i < columns) to[i].bits = static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16);
        }
    }
}

// ROUND, after cuBLAS: sums [T, tiles x 16] in float32 to where the parts want them.
__global__ void __launch_bounds__(256) round_kernel(const __grid_constant__ Parts parts, const float* sums, int tokens) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, rows = parts.tiles * TILE_ROWS;
    if (at >= rows * tokens) return;
    const int token = at / rows, row = at % rows;
    const Part& part = part_of(parts, row / TILE_ROWS);
    put(part, row - part.first_tile * TILE_ROWS, token, sums[at]);
}

}  // namespace

// parts: `count` structures in host memory; cuts [grid / ranks + 1] in host memory, copied into the launch. scratch: sums
// for ROUND; of more than eight tokens, what the kernels of a launch hand on (Many), aligned to 16, or null. ranks, height,
// cold: of the kernel for few tokens.
extern "C" int dsv4_linear(const Part* parts, int count, int tiles, const uint32_t* cuts, int grid, float* scratch,
                           int tokens, int columns, int mode, int window, int batch, int stages,
                           int ranks, int height, int cold, int shared_bytes, cudaStream_t stream) {
    if (count < 1 || count > MAX_PARTS) return cudaErrorInvalidValue;
    Parts table = {};  // all of it: a graph holds every byte, also of parts that are not there
    for (int i = 0; i < count; ++i) table.part[i] = parts[i];
    table.count = count, table.tiles = tiles;
    const int blocks = (columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
    if (mode == DENSE) {
        const int64_t warps = static_cast<int64_t>(tiles) * blocks;
        return launch(dense_kernel, (warps + 7) / 8, 1, 256, 0, 1, stream, table, blocks, columns);
    }
    if (mode == ROUND) {
        const int64_t threads = static_cast<int64_t>(tiles) * TILE_ROWS * tokens;
        return launch(round_kernel, (threads + 255) / 256, 1, 256, 0, 1, stream, table, scratch, tokens);
    }
    if (grid < 1 || grid > MAX_GRID || tokens < 1 || tokens > 64 || ranks < 1 || grid % ranks)
        return cudaErrorInvalidValue;
    const int slices = (blocks + SLICE_BLOCKS - 1) / SLICE_BLOCKS;
    if (tokens <= FEW_TOKENS) {
        if (mode == SPLIT) return cudaErrorInvalidValue;
        Few task = {};
        task.parts = table, task.cold = cold;
        for (int i = 0; i <= grid / ranks; ++i) task.cuts[i] = cuts[i];
        task.tokens = tokens, task.columns = columns, task.blocks = blocks, task.slices = slices;
        task.ranks = ranks, task.window = window, task.batch = batch, task.stages = stages;
        return start_few(task, grid, height, mode == OWN, shared_bytes, stream);
    }
    Many task = {};
    task.parts = table;
    for (int i = 0; i <= grid; ++i) task.cuts[i] = cuts[i];
    task.partials = scratch, task.staged = reinterpret_cast<uint8_t*>(scratch);
    for (int i = 0; i < count; ++i) task.inputs = std::max(task.inputs, table.part[i].input + 1);
    task.tokens = tokens, task.columns = columns, task.blocks = blocks, task.slices = slices;
    task.window = window, task.stages = stages;
    auto go = tokens <= 16   ? (mode == OWN ? run<2, false> : run<2, true>)
              : tokens <= 32 ? (mode == OWN ? run<4, false> : run<4, true>)
                             : (mode == OWN ? run<8, false> : run<8, true>);
    const bool all_here = mode == OWN && tokens <= CONVERTED && task.inputs == 1 && window == slices;
    if (mode == MEET || window < 1 || window > slices || (scratch == nullptr && !all_here)) return cudaErrorInvalidValue;
    return go(task, grid, shared_bytes, stream);
}
