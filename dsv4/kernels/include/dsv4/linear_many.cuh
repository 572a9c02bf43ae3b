// 9 to 64 tokens: 16 warps, each with a ring of weights of its own, waiting for nobody else's. Where tokens are many and
// the GPU can, the warps of a group multiply four tiles with the same slice of the tokens together (wide_product.cuh).
//
// Slices of the tokens lie in shared memory in the order of wide_product.cuh, scaled FP16 (BF16 for BF16 weights).
//   OWN    a block needs every slice once per 16 tiles: `stage_tokens` has converted them once for all blocks, the copy
//          engine brings them one by one, and no warp waits for another but where the room for the next is not free. Of
//          few slices and tokens a block converts all of them itself, and keeps them
//   SPLIT  a block needs one slice or two: it converts them itself, the next one while one is multiplied if there is room
//
// Tokens come behind what was asked for before them, and nothing is multiplied without them. So a warp asks for one stage
// of its ring while it waits for its turn, then for its tokens, then for the other stages.
#pragma once
#include <dsv4/dependent.cuh>
#include <dsv4/linear.cuh>
#include <dsv4/wide_product.cuh>

namespace dsv4::linear {

constexpr int MANY_WARPS = 16, MANY_THREADS = MANY_WARPS * 32, TOGETHER = 4, GROUPS = MANY_WARPS / TOGETHER;
constexpr int STAGE_WARPS = 4;  // of a block that stages
constexpr int CONVERTED = 16;  // tokens, at most, that blocks with whole tiles convert themselves, if all slices have room
constexpr int MEET_FROM = 4;  // tiles of eight tokens from which on warps multiply together: with fewer, alone is faster
// Of blocks, that a warp has unpacked at a time when warps multiply together: of 64 tokens no more have room in registers.
template <int NT>
constexpr int HALVES = NT == 8 ? 2 : 3;

struct Many {
    Parts parts;
    uint32_t cuts[MAX_GRID + 1];  // block b takes the units cuts[b] .. cuts[b + 1]: tiles; SPLIT: slice * tiles + tile
    float* partials;              // SPLIT: [tile][slice][NT][lane][4], accumulators as they are
    uint8_t* staged;              // OWN: [inputs][slices] as in shared memory, then what undoes their scaling [8 NT] each.
                                  // Null: there is one input, whose slices have room in the window, and blocks convert them
    int tokens, columns, blocks, slices;
    int inputs;  // OWN: of `staged`; Part::input says which is whose
    int window;  // slices of the tokens that shared memory has room for, no more than there are
    int stages;  // of each warp's ring
};

// Consecutive tiles of one part: up to 16, of which a block multiplies all slices (OWN), or more and one slice (SPLIT).
struct Pass {
    int part, tile, tiles, slice;
};

// The passes of a block, in order.
template <bool SPLIT>
struct Passes {
    uint32_t at, end;
    int part = 0, slice = SPLIT ? -1 : 0;
    __device__ __forceinline__ explicit Passes(const Many& task)
        : at(task.cuts[blockIdx.x]), end(task.cuts[blockIdx.x + 1]) {}

    __device__ __forceinline__ bool next(const Many& task, Pass& p) {
        if (at >= end) return false;
        uint32_t tile = at;
        if (SPLIT) {
            const uint32_t now = at / task.parts.tiles;
            tile = at - now * task.parts.tiles;
            if (static_cast<int>(now) != slice) slice = now, part = 0;
        }
        while (part + 1 < task.parts.count && tile >= static_cast<uint32_t>(task.parts.part[part + 1].first_tile)) ++part;
        const int stop = part + 1 < task.parts.count ? task.parts.part[part + 1].first_tile : task.parts.tiles;
        const int left = SPLIT ? static_cast<int>(end - at) : min(static_cast<int>(end - at), MANY_WARPS);
        p = {part, static_cast<int>(tile) - task.parts.part[part].first_tile, min(stop - static_cast<int>(tile), left), slice};
        at += p.tiles;
        return true;
    }
};

// An item is what a group takes at a time: up to four tiles of a pass. With SPLIT every group takes the next item of the
// block in turn; else each pass has one for every group.
__device__ __forceinline__ int items_of(const Pass& p) { return (p.tiles + TOGETHER - 1) / TOGETHER; }

// What a warp has still to ask the copy engine for. In shared memory: lane 0 looks at it once per chunk, and registers
// are scarce.
template <bool SPLIT>
struct ManyRequests {
    Passes<SPLIT> rest;
    Pass pass = {};
    int item;
    int left = 0, chunk = 0;  // bytes; left: of the tile, -1 when nothing is left at all
    const uint8_t* from = nullptr;

    __device__ __forceinline__ ManyRequests(const Many& task, int warp) : rest(task), item(warp / TOGETHER) {}

    __device__ __forceinline__ bool open(const Many& task, int warp) {
        int own;  // the warp's tile of an item
        do {
            for (int items; item >= (items = items_of(pass));) {
                if (!rest.next(task, pass)) {
                    left = -1;
                    return false;
                }
                item = SPLIT ? item - items : warp / TOGETHER;
            }
            own = item * TOGETHER + warp % TOGETHER;
            item += GROUPS;
        } while (own >= pass.tiles);
        const Part& part = task.parts.part[pass.part];
        const int bytes = block_bytes(part.format), first = pass.slice * SLICE_BLOCKS, tile = pass.tile + own;
        from = part.tiles + (static_cast<int64_t>(tile) * task.blocks + first) * bytes;
        left = (SPLIT ? min(task.blocks - first, SLICE_BLOCKS) : task.blocks) * bytes;
        chunk = chunk_blocks(part.format) * bytes;
        return true;
    }
    __device__ __forceinline__ void request(const Many& task, int warp, uint32_t to, uint32_t full) {
        if (left <= 0 && (left < 0 || !open(task, warp))) return;
        const int bytes = min(left, chunk);
        bulk_load(to, from, bytes, full);
        from += bytes, left -= bytes;
    }
};

static_assert(sizeof(ManyRequests<true>) == 56, "kernels/linear/schedule.py leaves so much room for each warp");

template <int NT>
constexpr int SLICE_ROOM = NT * SLICE_BLOCKS * 1024;  // bytes of a slice of the tokens

// OWN: the slices of the tokens for all blocks. A warp per row of a slice; its lane 4 s + t holds the columns 16 t .. 16 t
// + 15 of step s, whose pairs are the words t of the eight pieces there.
template <int NT>
__global__ void __launch_bounds__(STAGE_WARPS * 32) stage_tokens(const __grid_constant__ Many task) {
    let_next_start();
    const int lane = threadIdx.x % 32, at = blockIdx.x * STAGE_WARPS + threadIdx.x / 32;
    const int token = at % task.tokens, place = at / task.tokens, input = place / task.slices;
    if (input >= task.inputs) return wait_for_previous();
    int which = 0;
    while (task.parts.part[which].input != input) ++which;
    const Part& part = task.parts.part[which];
    const int column = (place - input * task.slices) * SLICE + lane * 16;
    const bf16* const from = part.x + token * part.x_stride + column;
    const bool wide = part.x_wide, plain = part.format == PLAIN;
    all_at_hand(from, wide, plain);
    wait_for_previous();
    uint32_t pairs[8];
    load_columns(pairs, from, task.columns - column, wide);
    const float back = plain ? 1.0f : scale_to_f16(pairs);
    uint8_t* const step = task.staged + place * static_cast<int64_t>(SLICE_ROOM<NT>) + lane / 4 * NT * 1024;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        *reinterpret_cast<uint32_t*>(step + wide::piece_at(token, i) + lane % 4 * 4) = pairs[i];
    float* const undo = reinterpret_cast<float*>(task.staged + task.inputs * task.slices * static_cast<int64_t>(SLICE_ROOM<NT>));
    if (lane == 0) undo[place * 8 * NT + token] = back;
}

// OWN: the slices of the tokens in shared memory, asked for in the order in which they are multiplied. Who is the last to
// be done with one asks for what comes in its place.
template <int NT>
struct Staged {
    uint32_t data, full;  // shared addresses: [window][SLICE_ROOM], [window] barriers
    uint32_t undo, done;  // the same: [window][8 NT]; [window] counts of warps that are done with what lies there

    __device__ __forceinline__ void ask(const Many& task, int part, int slice, int place) const {
        const int64_t which = task.parts.part[part].input * task.slices + slice;
        const uint8_t* all_undo = task.staged + task.inputs * task.slices * static_cast<int64_t>(SLICE_ROOM<NT>);
        bulk_expect(full + place * 8, SLICE_ROOM<NT> + 32 * NT);
        bulk_share(data + place * SLICE_ROOM<NT>, task.staged + which * SLICE_ROOM<NT>, SLICE_ROOM<NT>, full + place * 8);
        bulk_share(undo + place * 32 * NT, all_undo + which * 32 * NT, 32 * NT, full + place * 8);
    }
    // By one lane of each warp, all of whose lanes have read what lies at `place`. True for the last warp: all have.
    __device__ __forceinline__ bool leave(int place) const {
        uint32_t before;
        asm volatile("atom.acq_rel.cta.shared::cta.add.u32 %0, [%1], 1;" : "=r"(before) : "r"(done + place * 4) : "memory");
        return before % MANY_WARPS == MANY_WARPS - 1;
    }
};

// SPLIT: which tokens, a slice of those of a part.
struct Tokens {
    int part = 0, slice = -1;

    __device__ __forceinline__ bool same(const Many& task, const Tokens& o) const {
        const Part &one = task.parts.part[part], &other = task.parts.part[o.part];
        return slice == o.slice && one.x == other.x && (one.format == PLAIN) == (other.format == PLAIN);
    }
};

// Asks for a warp's tokens of a slice: BF16, each where its converted form will lie, [8 steps][8 NT tokens] 128 bytes.
template <int NT>
__device__ __forceinline__ void ask_tokens(const Many& task, const Part& part, int slice, uint8_t* to) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int token = warp; token < task.tokens; token += MANY_WARPS)
#pragma unroll
        for (int piece = lane; piece < SLICE / 8; piece += 32) {
            const int column = slice * SLICE + piece * 8, left = task.columns - column;
            const bf16* from = part.x + token * part.x_stride + column;
            uint8_t* at = to + piece / 8 * NT * 1024 + wide::piece_at(token, piece % 8);
            if (part.x_wide && left >= 8) {
                start_copy16(shared_address(at), from);
            } else {
                uint32_t pairs[4];
                load_narrow(pairs, from, left);
                *reinterpret_cast<uint4*>(at) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        }
}

// Turns what the warp has asked for into the order of wide_product.cuh, scaled FP16 unless `plain`. undo: [8 NT]. Lane 4 s
// + t holds the columns 16 t .. 16 t + 15 of step s, whose pairs are the words t of the eight pieces there. Lanes of
// different steps write different pieces at a time, and so meet different banks.
template <int NT>
__device__ __forceinline__ void convert_tokens(const Many& task, bool plain, uint8_t* x, float* undo) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, step = lane / 4, t = lane % 4;
    const int turn = step % 2 * 4 + (step & 2) + step / 4;
    wait_for_copies();
    __syncwarp();
    for (int token = warp; token < task.tokens; token += MANY_WARPS) {
        uint8_t* const row = x + step * NT * 1024;
        const uint4 a = *reinterpret_cast<const uint4*>(row + wide::piece_at(token, 2 * t + step % 2));
        const uint4 b = *reinterpret_cast<const uint4*>(row + wide::piece_at(token, 2 * t + 1 - step % 2));
        uint32_t pairs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        const float back = plain ? 1.0f : scale_to_f16(pairs);
        const auto exchange = [&](bool yes, int i, int j) {
            const uint32_t first = pairs[i], second = pairs[j];
            pairs[i] = yes ? second : first, pairs[j] = yes ? first : second;
        };
        exchange(step & 2, 0, 2), exchange(step & 2, 1, 3), exchange(step & 2, 4, 6), exchange(step & 2, 5, 7);
        exchange(step & 4, 0, 1), exchange(step & 4, 2, 3), exchange(step & 4, 4, 5), exchange(step & 4, 6, 7);
        __syncwarp();  // every lane has read
#pragma unroll
        for (int i = 0; i < 8; ++i)
            *reinterpret_cast<uint32_t*>(row + wide::piece_at(token, i ^ turn) + t * 4) = pairs[i];
        if (lane == 0) undo[token] = back;
    }
    wide::publish();
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <int NT>
constexpr bool MEETS = NT >= MEET_FROM;  // whether the warps of a group multiply NVFP4 together
#else
template <int NT>
constexpr bool MEETS = false;
#endif

// sum += a block times the tokens of a step, each warp by itself. scale: of FP8.
template <int FORMAT, int NT>
__device__ __forceinline__ void block_alone(float (&sum)[1][NT][4], const uint8_t* block, uint32_t step, float scale) {
    uint32_t a[4][4];
    const int lane = threadIdx.x % 32;
    if constexpr (FORMAT == NVFP4) nvfp4_operands(a, w4::load(block, lane));
    else if constexpr (FORMAT == FP8) fp8_operands(a, block + lane * 16);
    else plain_operands(a, block + lane * 16);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        float part[4] = {};
        float(&to)[4] = FORMAT == FP8 ? part : sum[0][n];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t b[4];
            wide::load_tokens(b, step, n, h);
#pragma unroll
            for (int j = 0; j < 2; ++j)
                if constexpr (FORMAT == PLAIN) mma_bf16(to, a[2 * h + j], b[2 * j], b[2 * j + 1]);
                else mma_f16(to, a[2 * h + j], b[2 * j], b[2 * j + 1]);
        }
        if constexpr (FORMAT == FP8)
#pragma unroll
            for (int k = 0; k < 4; ++k) sum[0][n][k] = fmaf(part[k], scale, sum[0][n][k]);
    }
}

// sum += `count` blocks of a slice of a warp's tile, times the tokens at `x`, a shared address. The caller refills the
// ring after each chunk through `next`. live: the warp has a tile; else it multiplies what lies there if its group meets.
template <int NT, typename Next>
__device__ __forceinline__ void many_product(float (&sum)[1][NT][4], const Part& part, int tile, int slice, int count,
                                             uint32_t x, bool live, Ring<1>& ring, Next&& next) {
    if (part.format == NVFP4 && MEETS<NT>) {
        const int lane = threadIdx.x % 32;
        uint32_t a[HALVES<NT>][1][2][4];  // while one is unpacked, the others are multiplied
        // The half of a block whose tokens are the step at `step`; the place of it in a is free.
        const auto multiply = [&](const w4::Lane& own, int half, int place, uint32_t step) {
            uint32_t low, high;
            w4::scales(own.scales, low, high);
            w4::dequantize(a[place][0][0], half ? own.codes.z : own.codes.x, low, high);
            w4::dequantize(a[place][0][1], half ? own.codes.w : own.codes.y, low, high);
            wide::multiply<NT>(sum, a[place], step, half);
        };
#pragma unroll 1
        for (; count > 0; count -= 4, x += 4 * NT * 1024) {
            const uint8_t* chunk = live ? ring.wait() : ring.bytes;
            __syncwarp();
            if (count >= 4) {
                const uint32_t steps = __shfl_sync(0xFFFFFFFFu, x, 0);  // known to be one: descriptions need no vector
                w4::Lane own[2] = {w4::load(chunk, lane)};
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int next = i / 2 + 1;
                    if (i % 2 == 0 && next < 4) own[next % 2] = w4::load(chunk + next * w4::BLOCK_BYTES, lane);
                    if (i < 8 % HALVES<NT>) wide::settle<1>();  // what took their places is the last but one of a chunk
                    else wide::settle<HALVES<NT> - 1>();
                    multiply(own[i / 2 % 2], i % 2, i % HALVES<NT>, steps + i / 2 * NT * 1024);
                }
            } else {
#pragma unroll 1
                for (int k = 0; k < count; ++k) {
                    const w4::Lane own = w4::load(chunk + k * w4::BLOCK_BYTES, lane);
                    wide::settle<0>();
                    multiply(own, 0, 0, x + k * NT * 1024);
                    multiply(own, 1, 1, x + k * NT * 1024);
                }
            }
            if (live) next(ring);
        }
        wide::settle<0>();
        wide::take(sum);
    } else if (!live) {
        return;
    } else if (part.format == NVFP4) {
#pragma unroll 1
        for (; count > 0; count -= 4) {
            const uint8_t* chunk = ring.wait();
            if (NT < MEET_FROM && count >= 4) {
#pragma unroll
                for (int k = 0; k < 4; ++k, x += NT * 1024)
                    block_alone<NVFP4>(sum, chunk + k * w4::BLOCK_BYTES, x, 1.0f);
            } else {
#pragma unroll 1
                for (int k = 0; k < min(count, 4); ++k, x += NT * 1024)
                    block_alone<NVFP4>(sum, chunk + k * w4::BLOCK_BYTES, x, 1.0f);
            }
            next(ring);
        }
    } else if (part.format == FP8) {
        const int lane = threadIdx.x % 32, row = (part.first_row + tile * TILE_ROWS) / 128;
        const int column = slice * (SLICE / 128) + lane;
        const bool exists = lane < SLICE / 128 && column < part.scale_columns;
        const float scales = exists ? part.block_scale[row * part.scale_columns + column] : 0.0f;
#pragma unroll 1
        for (int done = 0; done < count; done += 2) {
            const float scale = __shfl_sync(0xFFFFFFFFu, scales, done / 2);
            const uint8_t* chunk = ring.wait();
#pragma unroll 1
            for (int k = 0; k < min(count - done, 2); ++k, x += NT * 1024)
                block_alone<FP8>(sum, chunk + k * 1024, x, scale);
            next(ring);
        }
    } else {
#pragma unroll 1
        for (int done = 0; done < count; ++done, x += NT * 1024) {
            block_alone<PLAIN>(sum, ring.wait(), x, 1.0f);
            next(ring);
        }
    }
}

// Sums of a slice, its scaling undone. undo: the slice's, [8 NT].
template <int NT>
__device__ __forceinline__ void undo_many(float (&sum)[NT][4], int format, const float* undo) {
    const float scale = format == NVFP4 ? w4::UNDO : 1.0f;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        const float2 back = *reinterpret_cast<const float2*>(undo + n * 8 + threadIdx.x % 4 * 2);
        const float even = back.x * scale, odd = back.y * scale;
        sum[n][0] *= even, sum[n][1] *= odd, sum[n][2] *= even, sum[n][3] *= odd;
    }
}

// Rounds once and stores what a warp holds of a tile.
template <int NT>
__device__ __forceinline__ void put_many(const Part& part, int row, int tokens, float (&sum)[NT][4]) {
    if (whole_rows(part, row)) {
        const Eight eight(part, row, tokens);
#pragma unroll
        for (int n = 0; n < NT; ++n) eight.scale(8 * n, sum[n]);
#pragma unroll
        for (int n = 0; n < NT; ++n)
            if (8 * n < tokens) eight.put(8 * n, sum[n]);
        return;
    }
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int n = 0; n < NT; ++n)  // the sums move up, so that this code is there once
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = 8 * n + lane % 4 * 2 + i % 2;
            if (token < tokens) put(part, row + lane / 4 + i / 2 * 8, token, sum[0][i]);
#pragma unroll
            for (int k = 0; k + 1 < NT; ++k) sum[k][i] = sum[k + 1][i];
        }
}

// OWN: whole tiles, 16 at a time, all slices of each.
template <int NT, typename Refill, typename Fill, typename Turn>
__device__ __forceinline__ void whole_tiles(const Many& task, const Staged<NT>& staged, uint8_t* x, float* undo,
                                            Ring<1>& ring, Refill&& refill, Fill&& fill, Turn&& turn) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Passes<false> rest(task);
    Pass pass = {}, then;
    bool more = rest.next(task, pass);
    const bool all_here = 8 * NT == CONVERTED && task.staged == nullptr;
    const Part& own = task.parts.part[pass.part];
    all_at_hand(own.x, own.x_stride, own.x_wide, own.input, task.inputs, task.staged);
    turn();
    if (all_here) {
        const Part& part = task.parts.part[0];
        for (int i = 0; i < task.slices; ++i) ask_tokens<NT>(task, part, i, x + i * SLICE_ROOM<NT>);
        fill();
        for (int i = 0; i < task.slices; ++i)
            convert_tokens<NT>(task, part.format == PLAIN, x + i * SLICE_ROOM<NT>, undo + i * 8 * NT);
        __syncthreads();
    } else {
        if (threadIdx.x == 0)
            for (int i = 0; i < task.window; ++i) staged.ask(task, pass.part, i, i);
        fill();
    }
    int place = 0;
    uint32_t parity = 0;
    while (more) {
        more = rest.next(task, then = pass);
        const Part& part = task.parts.part[pass.part];
        const int tile = pass.tile + warp;
        const bool live = warp < pass.tiles;
        float total[NT][4] = {};
#pragma unroll 1
        for (int slice = 0; slice < task.slices; ++slice) {
            const int count = min(task.blocks - slice * SLICE_BLOCKS, SLICE_BLOCKS);
            float sum[1][NT][4] = {};
            if (!all_here) barrier_wait(staged.full + place * 8, parity);
            __syncwarp();
            many_product<NT>(sum, part, tile, slice, count, staged.data + place * SLICE_ROOM<NT>, live, ring, refill);
            undo_many<NT>(sum[0], part.format, undo + place * 8 * NT);
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) total[n][i] += sum[0][n][i];
            __syncwarp();
            if (!all_here && lane == 0 && staged.leave(place)) {
                const int ahead = slice + task.window;  // of all that are still to come
                if (ahead < task.slices) staged.ask(task, pass.part, ahead, place);
                else if (more) staged.ask(task, then.part, ahead - task.slices, place);
            }
            if (++place == task.window) place = 0, parity ^= 1;
        }
        if (live) put_many<NT>(part, tile * TILE_ROWS, task.tokens, total);
        pass = then;
    }
}

// SPLIT: slices of tiles, whose sums go to `partials`.
template <int NT, typename Refill, typename Fill>
__device__ __forceinline__ void single_slices(const Many& task, uint8_t* x, float* undo, Ring<1>& ring, Refill&& refill,
                                              Fill&& fill) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    Passes<true> rest(task);
    Pass pass, then;
    Tokens held, before;  // at `place`; where there is room for two, at the other
    int place = 0, item = warp / TOGETHER;
    bool more = rest.next(task, pass);
    if (more) {
        held = {pass.part, pass.slice};
        ask_tokens<NT>(task, task.parts.part[pass.part], pass.slice, x);
        fill();
        convert_tokens<NT>(task, task.parts.part[pass.part].format == PLAIN, x, undo);
        __syncthreads();
    }
    while (more) {
        const Tokens wanted = {pass.part, pass.slice};
        if (!wanted.same(task, held)) {
            __syncthreads();  // nobody reads those before these any more, and these are there if they were asked for
            if (wanted.same(task, before)) {
                before = held, place ^= 1;
            } else {
                ask_tokens<NT>(task, task.parts.part[pass.part], pass.slice, x + place * SLICE_ROOM<NT>);
                convert_tokens<NT>(task, task.parts.part[pass.part].format == PLAIN, x + place * SLICE_ROOM<NT>,
                                   undo + place * 8 * NT);
                __syncthreads();
            }
            held = wanted;
        }
        more = rest.next(task, then = pass);
        const Tokens coming = {then.part, then.slice};
        const bool ahead = more && task.window == 2 && !coming.same(task, held) && !coming.same(task, before);
        if (ahead) ask_tokens<NT>(task, task.parts.part[then.part], then.slice, x + (place ^ 1) * SLICE_ROOM<NT>);

        const Part& part = task.parts.part[pass.part];
        const int count = min(task.blocks - pass.slice * SLICE_BLOCKS, SLICE_BLOCKS), items = items_of(pass);
        const uint32_t step = shared_address(x) + place * SLICE_ROOM<NT>;
        for (; item < items; item += GROUPS) {
            const int own = item * TOGETHER + warp % TOGETHER, tile = pass.tile + own;
            const bool live = own < pass.tiles;
            float sum[1][NT][4] = {};
            many_product<NT>(sum, part, tile, pass.slice, count, step, live, ring, refill);
            undo_many<NT>(sum[0], part.format, undo + place * 8 * NT);
            const int64_t place_of_sums = (static_cast<int64_t>(part.first_tile + tile) * task.slices + pass.slice) * NT;
            float4* slot = reinterpret_cast<float4*>(task.partials) + place_of_sums * 32 + lane;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const float(&v)[4] = sum[0][n];
                if (live && 8 * n + 2 * t < task.tokens) __stcg(slot + n * 32, make_float4(v[0], v[1], v[2], v[3]));
            }
        }
        item -= items;
        if (ahead) {
            convert_tokens<NT>(task, task.parts.part[then.part].format == PLAIN, x + (place ^ 1) * SLICE_ROOM<NT>,
                               undo + (place ^ 1) * 8 * NT);
            before = coming;
        }
        pass = then;
    }
}

template <int NT, bool SPLIT>
__global__ void __launch_bounds__(MANY_THREADS, 1) linear_many(const __grid_constant__ Many task) {
    // x, from a multiple of 1024 on | rings | undo | the rings' barriers | requests | the slices' barriers | warps done
    extern __shared__ uint8_t memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    uint8_t* const x = memory + (1024 - shared_address(memory) % 1024) % 1024;
    uint8_t* const rings = x + task.window * SLICE_ROOM<NT>;
    float* const undo = reinterpret_cast<float*>(rings + MANY_WARPS * task.stages * CHUNK);  // [window][8 NT]
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(undo + task.window * 8 * NT) + warp * task.stages;
    uint8_t* const ring_bytes = rings + warp * task.stages * CHUNK;
    Ring<1> ring = {shared_address(ring_bytes), shared_address(barriers), ring_bytes, task.stages, 0, 0};
    ManyRequests<SPLIT>* const all_requests =
        reinterpret_cast<ManyRequests<SPLIT>*>(barriers + (MANY_WARPS - warp) * task.stages);
    ManyRequests<SPLIT>* const requests = all_requests + warp;
    uint64_t* const slices = reinterpret_cast<uint64_t*>(all_requests + MANY_WARPS);
    uint32_t* const done = reinterpret_cast<uint32_t*>(slices + task.window);
    const Staged<NT> staged = {shared_address(x), shared_address(slices), shared_address(undo), shared_address(done)};
    if (!SPLIT && threadIdx.x == 0)
        for (int i = 0; i < task.window; ++i) barrier_init(staged.full + i * 8, 1), done[i] = 0;
    ManyRequests<SPLIT> first(task, warp);  // in registers until the ring is full
    if (lane < ring.stages) {
        barrier_init(ring.full + lane * 8, 1);
        barriers_ready();
    }
    __syncwarp();
    if (lane == 0) first.request(task, warp, ring.data, ring.full);
    if (SPLIT) __syncwarp();
    else __syncthreads();  // the slices' barriers are there
    const auto turn = [] {
        wait_for_previous();
        let_next_start();
    };
    const auto refill = [&](Ring<1>& r) {
        __syncwarp();  // every lane has read the stage
        if (lane == 0) requests->request(task, warp, r.data + r.at * CHUNK, r.full + r.at * 8);
        r.advance();
    };
    const auto fill = [&] {  // once, behind what the first tokens were asked for
        if (lane == 0) {
            for (int i = 1; i < ring.stages; ++i)
                first.request(task, warp, ring.data + i * CHUNK, ring.full + i * 8);
            *requests = first;
        }
    };
    if constexpr (SPLIT) {
        turn();
        single_slices<NT>(task, x, undo, ring, refill, fill);
    } else {
        whole_tiles<NT>(task, staged, x, undo, ring, refill, fill, turn);
    }
}

}  // namespace dsv4::linear
