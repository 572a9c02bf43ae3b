// linear: every projection of an input in one or two launches, for up to 64 tokens at a time.
//
// Blocks are persistent, one per processor; each warp streams its own weights through a ring of bulk copies and nobody
// waits for another warp to load, nor for the kernel in front: weights are asked for before it has ended. Tokens are
// staged once per block (or per slice, where they are many): scaled FP16 for NVFP4 and FP8 weights, BF16 for BF16
// weights. Three ways of spreading tiles (16 rows x K) and their slices:
//   OWN    many tiles: a warp takes whole tiles and keeps the sum of the slices in registers
//   MEET   few tiles, up to eight tokens: a cluster takes whole tiles, its blocks and their warps the slices; sums meet
//          in shared memory
//   SPLIT  few tiles, more tokens: blocks take slices; sums meet in `partials`, and a second kernel adds them up: whoever
//          came last would read alone what all have written
// Up to eight tokens have a kernel of their own (linear_few.cuh).
#include <dsv4/dependent.cuh>
#include <dsv4/linear_few.cuh>

using namespace dsv4;
using namespace dsv4::linear;

namespace {

enum Mode : int { OWN = 0, MEET = 1, SPLIT = 2, DENSE = 3, ROUND = 4 };  // the codes of kernels/linear/schedule.py

struct Task {
    Parts parts;
    uint32_t cuts[MAX_GRID + 1];  // block b takes the units cuts[b] .. cuts[b + 1]: tiles; SPLIT: slice * tiles + tile
    float* partials;              // SPLIT: [tile][slice][NT][lane][4], accumulators as they are
    int tokens, columns, blocks, slices;
    int staged;   // token rows that shared memory has room for
    int window;   // slices that are staged together
    int batch;    // tiles that a block takes at a time
    int streams;  // warps that have a ring; SPLIT may have fewer items than warps
    int stages;   // of each ring
};

// Consecutive tiles of one part; SPLIT: and which slice of them.
struct Rectangle {
    int part, tile, tiles, slice;
};

// The rectangles of a block, in order.
template <int MODE>
struct Rectangles {
    uint32_t at, end;
    int part, slice;
    __device__ __forceinline__ explicit Rectangles(const Task& task)
        : at(task.cuts[blockIdx.x]), end(task.cuts[blockIdx.x + 1]), part(0), slice(-1) {}

    __device__ __forceinline__ bool next(const Task& task, Rectangle& r) {
        if (at >= end) return false;
        uint32_t tile = at;
        if (MODE == SPLIT) {
            const uint32_t now = at / task.parts.tiles;
            tile = at - now * task.parts.tiles;
            if (static_cast<int>(now) != slice) slice = now, part = 0;
        }
        while (part + 1 < task.parts.count && tile >= static_cast<uint32_t>(task.parts.part[part + 1].first_tile)) ++part;
        const int stop = part + 1 < task.parts.count ? task.parts.part[part + 1].first_tile : task.parts.tiles;
        const int left = min(static_cast<int>(end - at), task.batch);
        r.part = part;
        r.tile = tile - task.parts.part[part].first_tile;
        r.tiles = min(stop - static_cast<int>(tile), left);
        r.slice = MODE == SPLIT ? slice : 0;
        at += r.tiles;
        return true;
    }
};

template <int NT>
__device__ __forceinline__ int items_of(const Rectangle& r) {
    constexpr int TILES = Form<NT>::TILES;
    return (r.tiles + TILES - 1) / TILES;
}

// What a warp has still to ask the copy engine for. Only lane 0 keeps one. An item is what a warp takes at a time: as
// many tiles as it multiplies at once, of all slices (OWN) or of one. With SPLIT every warp takes the next item of the
// block in turn; else each rectangle begins with warp 0.
template <int NT, int MODE>
struct Requests {
    static constexpr int TILES = Form<NT>::TILES, WARPS = Form<NT>::WARPS;
    Rectangles<MODE> rest;
    Rectangle r;
    int item;
    const uint8_t* from;
    int left, tiles;

    __device__ __forceinline__ explicit Requests(const Task& task, int warp)
        : rest(task), item(warp), from(nullptr), left(0), tiles(0) {
        r.tiles = 0;
    }
    __device__ __forceinline__ bool open(const Task& task, int warp) {
        for (int items; item >= (items = items_of<NT>(r));) {
            if (!rest.next(task, r)) return false;
            item = MODE == SPLIT ? item - items : warp;
        }
        const Part& part = task.parts.part[r.part];
        const int bytes = block_bytes(part.format);
        const int first_tile = item * TILES, first = r.slice * SLICE_BLOCKS;
        const int count = MODE == OWN ? task.blocks : min(task.blocks - first, SLICE_BLOCKS);
        tiles = min(r.tiles - first_tile, TILES);
        from = part.tiles + (static_cast<int64_t>(r.tile + first_tile) * task.blocks + first) * bytes;
        left = count * bytes;
        item += WARPS;
        return true;
    }
    __device__ __forceinline__ void request(const Task& task, int warp, uint32_t to, uint32_t full) {
        if (left == 0 && !open(task, warp)) return;
        const int format = task.parts.part[r.part].format, bytes = min(left, chunk_blocks(format) * block_bytes(format));
        if (TILES == 1 || tiles == 1) {
            bulk_load(to, from, bytes, full);
        } else {
            bulk_expect(full, 2 * bytes);
            bulk_copy(to, from, bytes, full);
            bulk_copy(to + CHUNK, from + static_cast<int64_t>(task.blocks) * block_bytes(format), bytes, full);
        }
        from += bytes;
        left -= bytes;
    }
};

// What decides how tokens are staged: whose they are, which slice, in which format.
struct Tokens {
    const bf16* x = nullptr;
    int slice = -1;
    bool plain = false;

    __device__ __forceinline__ bool change(const Part& part, int now) {
        const bool other = part.format == PLAIN;
        if (x == part.x && slice == now && plain == other) return false;
        x = part.x, slice = now, plain = other;
        return true;
    }
};

template <int NT>
struct Shared {
    uint8_t* x;   // [T][window] slices of 1 KB, and 16 bytes that keep rows off one another's banks
    float* undo;  // [window][8 NT]
    int stride;
};

// `slices` slices of a part's tokens, from `slice` on, to the window, from `place` on. All loads are in flight together;
// each lane then converts what it has loaded.
template <int NT>
__device__ void stage(const Shared<NT>& s, const Task& task, const Part& part, int slice, int slices, int place) {
    constexpr int WARPS = Form<NT>::WARPS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = slices * task.tokens;
    uint8_t* const base = s.x + place * 1024 + lane * 32;
    for (int pair = warp; pair < count; pair += WARPS) {
        const int token = pair % task.tokens, which = pair / task.tokens;
        const int column = (slice + which) * SLICE + lane * 16, left = task.columns - column;
        const bf16* from = part.x + token * part.x_stride + column;
        uint4* to = reinterpret_cast<uint4*>(base + token * s.stride + which * 1024);
        if (part.x_wide && left >= 16) {
            start_copy16(shared_address(to), from);
            start_copy16(shared_address(to + 1), from + 8);
        } else {
            uint32_t pairs[8];
            load_columns(pairs, from, left, false);
            to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
        }
    }
    wait_for_copies();
    if (part.format == PLAIN) {
        for (int i = threadIdx.x; i < slices * 8 * NT; i += Form<NT>::THREADS) s.undo[place * 8 * NT + i] = 1.0f;
        return;
    }
    for (int pair = warp; pair < count; pair += WARPS) {
        const int token = pair % task.tokens, which = pair / task.tokens;
        uint4* at = reinterpret_cast<uint4*>(base + token * s.stride + which * 1024);
        const uint4 a = at[0], b = at[1];
        uint32_t pairs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        const float undo = scale_to_f16(pairs);
        at[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        at[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
        if (lane == 0) s.undo[(place + which) * 8 * NT + token] = undo;
    }
}

__device__ __forceinline__ const Part& part_of(const Parts& parts, int tile) {
    int which = 0;
    while (which + 1 < parts.count && tile >= parts.part[which + 1].first_tile) ++which;
    return parts.part[which];
}

template <int NT, int MODE>
__global__ void __launch_bounds__(Form<NT>::THREADS) linear_kernel(const __grid_constant__ Task task) {
    constexpr int TILES = Form<NT>::TILES, WARPS = Form<NT>::WARPS;
    constexpr int STAGE = Ring<TILES>::STAGE;
    extern __shared__ __align__(128) uint8_t memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

    uint8_t* after = memory;  // rings | x | undo | barriers
    uint8_t* ring_bytes = after + warp * task.stages * STAGE;
    after += task.streams * task.stages * STAGE;
    Shared<NT> shared;
    shared.x = after;
    shared.stride = task.window * 1024 + 16;
    after += task.staged * shared.stride;
    shared.undo = reinterpret_cast<float*>(after);
    after += task.window * 8 * NT * sizeof(float);
    uint64_t* barriers = reinterpret_cast<uint64_t*>(after) + warp * task.stages;

    Ring<TILES> ring = {shared_address(ring_bytes), shared_address(barriers), ring_bytes, task.stages, 0, 0};
    Requests<NT, MODE> requests(task, warp);
    if (lane == 0 && warp < task.streams) {
        for (int i = 0; i < ring.stages; ++i) barrier_init(ring.full + i * 8, 1);
        barriers_ready();
        for (int i = 0; i < ring.stages; ++i) requests.request(task, warp, ring.data + i * STAGE, ring.full + i * 8);
    }
    __syncwarp();
    wait_for_previous();
    let_next_start();
    const auto refill = [&](Ring<TILES>& r) {
        __syncwarp();  // every lane has read the stage
        if (lane == 0) requests.request(task, warp, r.data + r.at * STAGE, r.full + r.at * 8);
        r.advance();
    };

    const Rows<NT> rows(task.tokens, shared.stride);
    Rectangles<MODE> rest(task);
    Rectangle r;
    float sum[TILES][NT][4];

    // sum of one slice, which is at `place` of the window, of up to TILES tiles; its scaling undone
    const auto multiply = [&](const Part& part, int tile, int tiles, int slice, int place) {
        const int count = min(task.blocks - slice * SLICE_BLOCKS, SLICE_BLOCKS);
        clear(sum);
        slice_product(sum, part, part.format, tile, tiles, slice, count, shared.x + place * 1024, rows, ring, refill);
        const float* undo = shared.undo + place * 8 * NT + 2 * t;
        const float scale = part.format == NVFP4 ? w4::UNDO : 1.0f;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const float undo_even = undo[8 * n] * scale, undo_odd = undo[8 * n + 1] * scale;
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                sum[i][n][0] *= undo_even, sum[i][n][1] *= undo_odd;
                sum[i][n][2] *= undo_even, sum[i][n][3] *= undo_odd;
            }
        }
    };
    if (MODE == SPLIT) {
        bool more = rest.next(task, r);
        for (int item = warp; more;) {
            // As many rectangles as the window has room for: their tokens are staged, then multiplied.
            __syncthreads();
            int count = 0, place = -1;
            Tokens tokens;
            Rectangles<MODE> front = rest;
            for (Rectangle q = r;;) {
                const Part& part = task.parts.part[q.part];
                if (tokens.change(part, q.slice)) {
                    if (++place == task.window) break;
                    stage(shared, task, part, q.slice, 1, place);
                }
                ++count;
                if (!front.next(task, q)) break;
            }
            __syncthreads();
            place = -1, tokens = Tokens();
            for (; count > 0; --count) {
                const Part& part = task.parts.part[r.part];
                if (tokens.change(part, r.slice)) ++place;
                const int items = items_of<NT>(r);
                for (; item < items; item += WARPS) {
                    const int first = item * TILES, tiles = min(r.tiles - first, TILES);
                    multiply(part, r.tile + first, tiles, r.slice, place);
                    const int64_t tile = part.first_tile + r.tile + first;
                    float4* slot = reinterpret_cast<float4*>(task.partials) + (tile * task.slices + r.slice) * NT * 32 + lane;
#pragma unroll
                    for (int i = 0; i < TILES; ++i)
#pragma unroll
                        for (int n = 0; n < NT; ++n) {
                            const float(&v)[4] = sum[i][n];
                            if (i < tiles && 8 * n + 2 * t < task.tokens)
                                __stcg(slot + (i * task.slices * NT + n) * 32, make_float4(v[0], v[1], v[2], v[3]));
                        }
                }
                item -= items;
                more = rest.next(task, r);
            }
        }
        return;
    }

    Tokens tokens;
    const auto restage = [&](const Part& part, int slice) {
        if (!tokens.change(part, slice)) return;
        __syncthreads();  // nobody reads the old window any more
        stage(shared, task, part, slice, min(task.window, task.slices - slice), 0);
        __syncthreads();
    };
    while (rest.next(task, r)) {
        const Part& part = task.parts.part[r.part];
        const int first = warp * TILES, tiles = min(r.tiles - first, TILES);
        float total[TILES][NT][4] = {};
        for (int slice = 0; slice < task.slices; ++slice) {
            const int place = slice % task.window;
            if (place == 0) restage(part, slice);
            if (tiles <= 0) continue;
            multiply(part, r.tile + first, tiles, slice, place);
#pragma unroll
            for (int k = 0; k < TILES; ++k)
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) total[k][n][i] += sum[k][n][i];
        }
#pragma unroll
        for (int k = 0; k < TILES; ++k)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = (r.tile + first + k) * TILE_ROWS + g + i / 2 * 8, token = 8 * n + 2 * t + i % 2;
                    if (k < tiles && token < task.tokens) put(part, row, token, total[k][n][i]);
                }
    }
}

// SPLIT: adds up the slices in their order. One thread per lane and n-tile of a tile.
constexpr int SUM_THREADS = 256;
__global__ void __launch_bounds__(SUM_THREADS) sum_kernel(const __grid_constant__ Task task, int groups) {
    let_next_start();
    const int used = (task.tokens + 7) / 8, at = blockIdx.x * SUM_THREADS + threadIdx.x;
    const int lane = at % 32, n = at / 32 % used, tile = at / 32 / used, token = 8 * n + lane % 4 * 2;
    wait_for_previous();
    if (tile >= task.parts.tiles || token >= task.tokens) return;
    const float4* from = reinterpret_cast<const float4*>(task.partials);
    from += (static_cast<int64_t>(tile) * task.slices * groups + n) * 32 + lane;
    float sum[4] = {};
#pragma unroll 8
    for (int slice = 0; slice < task.slices; ++slice) {
        const float4 v = __ldcg(from + slice * groups * 32);
        sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
    const Part& part = part_of(task.parts, tile);
    const int row = (tile - part.first_tile) * TILE_ROWS + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (token + i % 2 < task.tokens) put(part, row + i / 2 * 8, token + i % 2, sum[i]);
}

template <int NT, int MODE>
cudaError_t run(const Task& task, int grid, size_t shared_bytes, cudaStream_t stream) {
    auto kernel = linear_kernel<NT, MODE>;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
    error = launch_dependent(kernel, grid, 1, Form<NT>::THREADS, shared_bytes, stream, task);
    if (MODE != SPLIT || error != cudaSuccess) return error;
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
    if (part.format == NVFP4) nvfp4_operands(a, block);
    else if (part.format == FP8) fp8_operands(a, block);
    else plain_operands(a, block);
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

// parts: `count` structures in host memory; cuts [grid / ranks + 1] in host memory, copied into the launch. ranks,
// height, cold: of the kernel for few tokens.
extern "C" int dsv4_linear(const Part* parts, int count, int tiles, const uint32_t* cuts, int grid, float* partials,
                           int tokens, int columns, int mode, int window, int batch, int streams,
                           int stages, int ranks, int height, int cold, int shared_bytes, cudaStream_t stream) {
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
        return launch(round_kernel, (threads + 255) / 256, 1, 256, 0, 1, stream, table, partials, tokens);
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
    Task task = {};
    task.parts = table;
    for (int i = 0; i <= grid; ++i) task.cuts[i] = cuts[i];
    task.partials = partials;
    task.tokens = tokens, task.columns = columns, task.blocks = blocks, task.slices = slices;
    task.staged = tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64;
    task.window = window, task.batch = batch, task.streams = streams, task.stages = stages;
    auto go = tokens <= 16   ? (mode == OWN ? run<2, OWN> : run<2, SPLIT>)
              : tokens <= 32 ? (mode == OWN ? run<4, OWN> : run<4, SPLIT>)
                             : (mode == OWN ? run<8, OWN> : run<8, SPLIT>);
    return mode == MEET ? cudaErrorInvalidValue : go(task, grid, shared_bytes, stream);
}
