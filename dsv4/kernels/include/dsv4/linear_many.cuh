// 9 to 64 tokens: four groups of four warps; the warps of a group multiply four tiles with the same slice of the tokens,
// together where the GPU can (wide_product.cuh). Each warp has its own ring of weights and waits for nobody else's.
//
// Two slices of the tokens, in the order of wide_product.cuh, lie in shared memory: while one is multiplied the next
// one comes as it is, and each warp converts what it has asked for. Where memory is short there is room for one only.
#pragma once
#include <dsv4/dependent.cuh>
#include <dsv4/linear.cuh>
#include <dsv4/wide_product.cuh>

namespace dsv4::linear {

constexpr int MANY_WARPS = 16, MANY_THREADS = MANY_WARPS * 32, TOGETHER = 4, GROUPS = MANY_WARPS / TOGETHER;

struct Many {
    Parts parts;
    uint32_t cuts[MAX_GRID + 1];  // block b takes the units cuts[b] .. cuts[b + 1]: tiles; SPLIT: slice * tiles + tile
    float* partials;              // SPLIT: [tile][slice][NT][lane][4], accumulators as they are
    int tokens, columns, blocks, slices;
    int window;  // slices of the tokens that shared memory has room for: 1 or 2
    int stages;  // of each warp's ring
};

// Consecutive tiles of one part, and the slice of them that a block multiplies next.
struct Pass {
    int part, tile, tiles, slice;
};

// The passes of a block, in order. With SPLIT its tiles differ from slice to slice; else it takes all slices of 16
// tiles, then the next 16.
template <bool SPLIT>
struct Passes {
    uint32_t at, end;
    int part = 0, slice = -1;
    __device__ __forceinline__ explicit Passes(const Many& task)
        : at(task.cuts[blockIdx.x]), end(task.cuts[blockIdx.x + 1]) {}

    __device__ __forceinline__ bool next(const Many& task, Pass& p) {
        if (!SPLIT && slice >= 0 && ++slice < task.slices) {
            p.slice = slice;
            return true;
        }
        if (at >= end) return false;
        uint32_t tile = at;
        if (SPLIT) {
            const uint32_t now = at / task.parts.tiles;
            tile = at - now * task.parts.tiles;
            if (static_cast<int>(now) != slice) slice = now, part = 0;
        } else {
            slice = 0;
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
    int left = 0;
    const uint8_t* from = nullptr;

    __device__ __forceinline__ ManyRequests(const Many& task, int warp) : rest(task), item(warp / TOGETHER) {}

    __device__ __forceinline__ bool open(const Many& task, int warp) {
        int own;  // the warp's tile of an item
        do {
            for (int items; item >= (items = items_of(pass));) {
                if (!rest.next(task, pass)) return false;
                item = SPLIT ? item - items : warp / TOGETHER;
            }
            own = item * TOGETHER + warp % TOGETHER;
            item += GROUPS;
        } while (own >= pass.tiles);
        const int bytes = block_bytes(task.parts.part[pass.part].format);
        const int first = pass.slice * SLICE_BLOCKS, tile = pass.tile + own;
        from = task.parts.part[pass.part].tiles + (static_cast<int64_t>(tile) * task.blocks + first) * bytes;
        left = min(task.blocks - first, SLICE_BLOCKS) * bytes;
        return true;
    }
    __device__ __forceinline__ void request(const Many& task, int warp, uint32_t to, uint32_t full) {
        if (left == 0 && !open(task, warp)) return;
        const int format = task.parts.part[pass.part].format, bytes = min(left, chunk_blocks(format) * block_bytes(format));
        bulk_load(to, from, bytes, full);
        from += bytes, left -= bytes;
    }
};

static_assert(sizeof(ManyRequests<true>) == 48, "kernels/linear/schedule.py leaves so much room for each warp");

// Which tokens: a slice of those of a part.
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

// sum += a block times the tokens of a step, each warp by itself. scale: of FP8.
template <int FORMAT, int NT>
__device__ __forceinline__ void block_alone(float (&sum)[1][NT][4], const uint8_t* block, uint32_t step, float scale) {
    uint32_t a[4][4];
    if constexpr (FORMAT == NVFP4) nvfp4_operands(a, block);
    else if constexpr (FORMAT == FP8) fp8_operands(a, block);
    else plain_operands(a, block);
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
// ring after each chunk through `next`. live: the warp has a tile; else it multiplies what lies there, as its group does.
template <int NT, typename Next>
__device__ __forceinline__ void many_product(float (&sum)[1][NT][4], const Part& part, int tile, int slice, int count,
                                             uint32_t x, bool live, Ring<1>& ring, Next&& next) {
    if (part.format == NVFP4) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
        const int lane = threadIdx.x % 32;
        uint32_t a[2][1][2][4];  // halves of a block
        for (int done = 0; done < count; done += 4) {
            const uint8_t* chunk = live ? ring.wait() : ring.bytes;
            __syncwarp();
#pragma unroll 1
            for (int k = 0; k < min(count - done, 4); ++k, x += NT * 1024) {
                const w4::Lane own = w4::load(chunk + k * w4::BLOCK_BYTES, lane);
                uint32_t low, high;
                w4::scales(own.scales, low, high);
                wide::settle<1>();
                w4::dequantize(a[0][0][0], own.codes.x, low, high);
                w4::dequantize(a[0][0][1], own.codes.y, low, high);
                wide::multiply<NT>(sum, a[0], x, 0);
                wide::settle<1>();
                w4::dequantize(a[1][0][0], own.codes.z, low, high);
                w4::dequantize(a[1][0][1], own.codes.w, low, high);
                wide::multiply<NT>(sum, a[1], x, 1);
            }
            if (live) next(ring);
        }
        wide::settle<0>();
        wide::take(sum);
#else
        if (!live) return;
#pragma unroll 1
        for (int done = 0; done < count; done += 4) {
            const uint8_t* chunk = ring.wait();
#pragma unroll 1
            for (int k = 0; k < min(count - done, 4); ++k, x += NT * 1024)
                block_alone<NVFP4>(sum, chunk + k * w4::BLOCK_BYTES, x, 1.0f);
            next(ring);
        }
#endif
    } else if (!live) {
        return;
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

template <int NT, bool SPLIT>
__global__ void __launch_bounds__(MANY_THREADS, 1) linear_many(const __grid_constant__ Many task) {
    constexpr int WINDOW_BYTES = NT * SLICE_BLOCKS * 1024;
    extern __shared__ uint8_t memory[];  // x, from a multiple of 1024 on | rings | undo | barriers | requests
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;

    uint8_t* const x = memory + (1024 - shared_address(memory) % 1024) % 1024;
    uint8_t* const rings = x + task.window * WINDOW_BYTES;
    float* const undo = reinterpret_cast<float*>(rings + MANY_WARPS * task.stages * CHUNK);  // [window][8 NT]
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(undo + task.window * 8 * NT) + warp * task.stages;
    uint8_t* const ring_bytes = rings + warp * task.stages * CHUNK;
    Ring<1> ring = {shared_address(ring_bytes), shared_address(barriers), ring_bytes, task.stages, 0, 0};
    ManyRequests<SPLIT>* const requests =
        reinterpret_cast<ManyRequests<SPLIT>*>(barriers + (MANY_WARPS - warp) * task.stages) + warp;
    if (lane == 0) {
        *requests = ManyRequests<SPLIT>(task, warp);
        for (int i = 0; i < ring.stages; ++i) barrier_init(ring.full + i * 8, 1);
        barriers_ready();
        for (int i = 0; i < ring.stages; ++i) requests->request(task, warp, ring.data + i * CHUNK, ring.full + i * 8);
    }
    __syncwarp();
    wait_for_previous();
    let_next_start();
    const auto refill = [&](Ring<1>& r) {
        __syncwarp();  // every lane has read the stage
        if (lane == 0) requests->request(task, warp, r.data + r.at * CHUNK, r.full + r.at * 8);
        r.advance();
    };

    Passes<SPLIT> rest(task);
    Pass pass, then;
    Tokens held, before;  // at `place`; where there is room for two, at the other
    int place = 0, item = warp / TOGETHER;
    float total[SPLIT ? 1 : NT][4] = {};
    bool more = rest.next(task, pass);
    while (more) {
        const Tokens wanted = {pass.part, pass.slice};
        if (!wanted.same(task, held)) {
            __syncthreads();  // nobody reads those before these any more, and these are there if they were asked for
            if (wanted.same(task, before)) {
                before = held, place ^= 1;
            } else {
                ask_tokens<NT>(task, task.parts.part[pass.part], pass.slice, x + place * WINDOW_BYTES);
                convert_tokens<NT>(task, task.parts.part[pass.part].format == PLAIN, x + place * WINDOW_BYTES,
                                   undo + place * 8 * NT);
                __syncthreads();
            }
            held = wanted;
        }
        more = rest.next(task, then = pass);
        const Tokens coming = {then.part, then.slice};
        const bool ahead = more && task.window == 2 && !coming.same(task, held) && !coming.same(task, before);
        if (ahead) ask_tokens<NT>(task, task.parts.part[then.part], then.slice, x + (place ^ 1) * WINDOW_BYTES);

        const Part& part = task.parts.part[pass.part];
        const int count = min(task.blocks - pass.slice * SLICE_BLOCKS, SLICE_BLOCKS), items = items_of(pass);
        const uint32_t step = shared_address(x) + place * WINDOW_BYTES;
        for (; item < items; item += GROUPS) {
            const int own = item * TOGETHER + warp % TOGETHER, tile = pass.tile + own;
            const bool live = own < pass.tiles;
            float sum[1][NT][4] = {};
            many_product<NT>(sum, part, tile, pass.slice, count, step, live, ring, refill);
            const float scale = part.format == NVFP4 ? w4::UNDO : 1.0f;
            const int64_t place_of_sums = (static_cast<int64_t>(part.first_tile + tile) * task.slices + pass.slice) * NT;
            float4* slot = reinterpret_cast<float4*>(task.partials) + place_of_sums * 32 + lane;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const float2 back = *reinterpret_cast<const float2*>(undo + (place * NT + n) * 8 + 2 * t);
                const float even = back.x * scale, odd = back.y * scale;
                float(&v)[4] = sum[0][n];
                v[0] *= even, v[1] *= odd, v[2] *= even, v[3] *= odd;
                if constexpr (SPLIT) {
                    if (live && 8 * n + 2 * t < task.tokens) __stcg(slot + n * 32, make_float4(v[0], v[1], v[2], v[3]));
                } else {
#pragma unroll
                    for (int i = 0; i < 4; ++i) total[n][i] += v[i];
                }
            }
            if (SPLIT || pass.slice + 1 < task.slices) continue;
            if constexpr (!SPLIT)
#pragma unroll 1
                for (int n = 0; n < NT; ++n) {  // the sums move up, so that this code is there once
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int row = tile * TILE_ROWS + lane / 4 + i / 2 * 8, token = 8 * n + 2 * t + i % 2;
                        if (live && token < task.tokens) put(part, row, token, total[0][i]);
#pragma unroll
                        for (int k = 0; k < NT; ++k) total[k][i] = k + 1 < NT ? total[k + 1][i] : 0.0f;
                    }
                }
        }
        item = SPLIT ? item - items : warp / TOGETHER;
        if (ahead) {
            convert_tokens<NT>(task, task.parts.part[then.part].format == PLAIN, x + (place ^ 1) * WINDOW_BYTES,
                               undo + (place ^ 1) * 8 * NT);
            before = coming;
        }
        pass = then;
    }
}

}  // namespace dsv4::linear
