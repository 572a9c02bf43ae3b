// Up to eight tokens: one launch sorts the pairs, multiplies with both projections and sums. There is a block per
// processor, and all of them must be running at once: two such launches side by side would wait for each other. Each
// sorts the few pairs for itself. A warp takes whole tiles, or pieces where they are too few for its block: the block's
// share of gate and up, then, when all blocks have met, its rows of down for every expert, which it adds up per token.
// The copy engine does not wait there: down's weights follow into the rings behind those of gate and up. Slices,
// scaling and every order of addition are those of moe_stream.cuh, and so are the bits.
#pragma once
#include <dsv4/dependent.cuh>
#include <dsv4/exchange.cuh>
#include <dsv4/moe_few_product.cuh>
#include <type_traits>

namespace dsv4::moe {

// A warp's ring of chunks, and those that it has still to ask for, in the order in which it takes its tiles.
template <bool FIRST, bool SECOND>
struct FewRing {
    const Few& f;
    const FewPlan& s;
    const Share& share;
    const Steps &first, &second;
    const int warp;
    const uint8_t* bytes;
    uint32_t data, barriers;
    int stages, at = 0;
    uint32_t parity = 0;
    const uint8_t* from = nullptr;
    int left = 0;  // bytes of the tile
    bool down = !FIRST;
    int to = 0;  // places of down that are behind or in the walk
    Walk walk;

    // The next tile that has weights to load.
    __device__ __forceinline__ bool open() {
        while (walk.at >= walk.end) {
            if (!SECOND || to >= share.places) return false;
            const Batch batch = share.batch(to, f.room);
            walk = second.start(batch.group, 0, batch.groups * share.tiles, warp);
            to = batch.to, down = true;
        }
        const int64_t expert = uniform(s.groups[walk.group].x);
        const bool later = SECOND && down;
        const int rows = later ? f.second.rows : f.first.rows, blocks = later ? f.second.blocks : f.first.blocks;
        const uint8_t* tiles = later ? f.second.tiles : f.first.tiles;
        const int halvings = later ? 0 : f.halvings, tile = walk.tile >> halvings;
        const int piece = walk.tile - (tile << halvings);
        const int begin = piece_begin(blocks, piece, halvings), end = piece_begin(blocks, piece + 1, halvings);
        left = (end - begin) * w4::BLOCK_BYTES;
        from = tiles + ((expert * rows + tile + (later ? share.first_tile : 0)) * blocks + begin) * w4::BLOCK_BYTES;
        (later ? second : first).advance(walk);
        return true;
    }
    __device__ __forceinline__ void request(int stage) {
        if (left == 0 && !open()) return;
        const int size = min(left, CHUNK);
        if (elected()) bulk_load(data + stage * CHUNK, from, size, barriers + 8 * stage);
        from += size, left -= size;
    }
    __device__ __forceinline__ const uint8_t* wait() const {
        barrier_wait(barriers + 8 * at, parity);
        return bytes + at * CHUNK;
    }
    __device__ __forceinline__ void refill() {
        __syncwarp();  // every lane has read the chunk
        request(at);
        if (++at == stages) at = 0, parity ^= 1;
    }
};

// All but the first piece of a tile park the sums of their slices, for the first one to add in their order.
struct Parked {
    float4* sums;  // of this lane, 32 apart
    int piece, warp, halvings;

    __device__ __forceinline__ bool operator()(int slice, const float (&sum)[4]) const {
        if (piece > 0) sums[slice * 32] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        return piece > 0;
    }
    // The pieces of a tile are neighbouring warps, and no warp has two (moe.cu).
    __device__ __forceinline__ void collect(float (&total)[4], int slice, int cuts) const {
        asm volatile("bar.sync %0, %1;" ::"r"(1 + (warp >> halvings)), "r"(32 << halvings) : "memory");
        if (piece > 0) return;
        for (; slice < 1 << cuts; ++slice) {
            const float4 sum = sums[slice * 32];
            total[0] += sum.x, total[1] += sum.y, total[2] += sum.z, total[3] += sum.w;
        }
    }
};

struct FewShared {
    uint64_t barriers[FEW_WARPS][MOST_CHUNKS];
    FewPlan plan;
};

// total = a piece of a tile, out of the ring, times 8 tokens. x: the lane's columns of token g. undo: of tokens 2 t and
// 2 t + 1. park: where pieces meet.
template <typename Ring>
__device__ __forceinline__ void tile_product(float (&total)[4], int blocks, int piece, int halvings, int lane,
                                             const uint8_t* x, const float* undo0, const float* undo1, Ring& ring,
                                             const Parked& park) {
    const int cuts = cuts_of(blocks), end = piece_begin(blocks, piece + 1, halvings);
    const bool sparse = blocks < 1 << cuts;  // slices of less than a block each: some have none
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] = 0.0f;
    int done = piece_begin(blocks, piece, halvings), slice = piece << (cuts - halvings);
    int stop = (slice + 1) * blocks >> cuts;
    x += done * 128, undo0 += slice, undo1 += slice;
    const auto skip = [&] { ++slice, ++undo0, ++undo1, stop = (slice + 1) * blocks >> cuts; };
    while (sparse && stop == 0) skip();
    const auto end_slice = [&](int done) {
        const float back[2] = {*undo0, *undo1};
        float sum[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = __fmul_rn(even[i] + odd[i], back[i % 2]), even[i] = odd[i] = 0.0f;
        if (!park(slice, sum))
#pragma unroll
            for (int i = 0; i < 4; ++i) total[i] += sum[i];
        skip();
        while (sparse && stop <= done && done < blocks) skip();
    };
    // A chunk of slices of WIDTH blocks: no sum outlives it.
    const int width = halvings > 0 || blocks % (1 << cuts) != 0 ? 0 : blocks >> cuts;
    const auto whole = [&](auto of, const w4::Lane (&parts)[CHUNK_BLOCKS]) {
        constexpr int WIDTH = decltype(of)::value, SLICES = CHUNK_BLOCKS / WIDTH;
#pragma unroll
        for (int s = 0; s < SLICES; ++s) {
            float even[4] = {}, odd[4] = {}, sum[4];
#pragma unroll
            for (int k = s * WIDTH; k < (s + 1) * WIDTH; ++k) multiply_block(even, odd, parts[k], x + k * 128);
            const float back[2] = {undo0[s], undo1[s]};
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] = __fmul_rn(even[i] + odd[i], back[i % 2]);
#pragma unroll
            for (int i = 0; i < 4; ++i) total[i] += sum[i];
        }
        done += CHUNK_BLOCKS, undo0 += SLICES, undo1 += SLICES;
    };
#pragma unroll 1
    while (done < end) {
        const uint8_t* block = ring.wait();
        w4::Lane parts[CHUNK_BLOCKS];  // beyond the row: what the ring last held there, multiplied with nothing
#pragma unroll
        for (int k = 0; k < CHUNK_BLOCKS; ++k) parts[k] = w4::load(block + k * w4::BLOCK_BYTES, lane);
        if (width == 4) {
            whole(std::integral_constant<int, 4>(), parts);
        } else if (width == 2) {
            whole(std::integral_constant<int, 2>(), parts);
        } else if (stop - done >= CHUNK_BLOCKS) {
#pragma unroll
            for (int k = 0; k < CHUNK_BLOCKS; ++k) multiply_block(even, odd, parts[k], x + k * 128);
            done += CHUNK_BLOCKS;
            if (done == stop) end_slice(done);
        } else {
#pragma unroll
            for (int k = 0; k < CHUNK_BLOCKS; ++k) {
                if (done == end) break;
                multiply_block(even, odd, parts[k], x + k * 128);
                if (++done == stop) end_slice(done);
            }
        }
        x += CHUNK_BLOCKS * 128;
        ring.refill();
    }
    if (halvings > 0) park.collect(total, slice, cuts);
}

// Every block has come here, and what they wrote is visible. Thread 0 is told how many blocks have left before; the
// last one to leave owes zeros.
__device__ __forceinline__ unsigned all_blocks_meet(unsigned* arrivals) {
    unsigned before = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        exchange::arrive(arrivals);
        while (exchange::arrived(arrivals) < gridDim.x) {}
    }
    __syncthreads();
    if (threadIdx.x == 0) before = atomicAdd(arrivals + 1, 1);
    return before;
}

template <bool FIRST, bool SECOND>
__global__ void __launch_bounds__(FEW_THREADS, 1) few(const __grid_constant__ Few f) {
    // Rings | staged rows | undo | parked sums | results of down by row and place.
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ FewShared shared;
    FewPlan& s = shared.plan;
    const int thread = threadIdx.x, lane = lane_id(), warp = uniform(thread / 32), g = lane / 4, t = lane % 4;
    const int pairs = f.tokens * f.first.topk;
    uint8_t* staged = memory + f.chunks * CHUNK;
    float* undo = reinterpret_cast<float*>(staged + f.staged);
    float4* parked = reinterpret_cast<float4*>(undo + max(f.tokens, f.room) * MOST_SLICES);
    bf16* results = reinterpret_cast<bf16*>(reinterpret_cast<uint8_t*>(parked) + f.parked);
    if (lane < MOST_CHUNKS) {
        barrier_init(shared_address(&shared.barriers[warp][lane]), 1);
        barriers_ready();
    }
    wait_for_previous();
    let_next_start();

    int64_t id = -1;
    float weight = 1.0f;
    if (thread < pairs) {
        id = f.ids[thread] - f.first_expert;
        if (FIRST) weight = f.first.weights[thread];
    }
    Staging<2> rows(f.first.x, f.first.x_row, f.tokens, f.first.columns, f.first.blocks);
    if (FIRST) rows.load(warp);
    if (thread < FEW_PAIRS) enter_pair(s, id >= 0 && id < f.experts ? static_cast<int>(id) : NOBODY, weight);
    Share share = plan_few(s, f.tokens, f.first.topk);
    deal(share, FIRST ? f.first.rows : 0, SECOND ? f.of_block : make_int2(0, 0));
    const int pieces = share.count << f.halvings, most = max(max(pieces, share.tiles * share.groups), 1);
    const int rounds = (most + FEW_WARPS - 1) / FEW_WARPS;
    share.warps = rounds == 1 ? most : quotient(most + rounds - 1, rounds);
    const Steps first(share.warps, f.first.rows << f.halvings), second(share.warps, share.tiles);
    Walk walk = FIRST ? first.start(0, share.begin << f.halvings, pieces, warp) : Walk{};
    const int stages = min(quotient(f.chunks, share.warps), MOST_CHUNKS);
    const uint8_t* bytes = memory + min(warp, share.warps - 1) * stages * CHUNK;
    FewRing<FIRST, SECOND> ring = {f, s, share, first, second, warp, bytes, shared_address(bytes),
                                   shared_address(shared.barriers[warp]), stages};
    ring.walk = walk;
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < stages; ++i) ring.request(i);

    // The thread's first element of the result, while there is time.
    const int elements = share.tiles * f.tokens * 16;
    const auto coordinates = [&](int i) {
        const int tile = quotient(i / 16, f.tokens);
        return make_int2(tile, i / 16 - tile * f.tokens);
    };
    const auto bits_at = [&](int i, int2 at) -> uint32_t {  // of the shared expert; a conversion would wait for them
        const int64_t from = at.y * f.shared_row + (share.first_tile + at.x) * 16 + i % 16;
        return f.out_f32 ? static_cast<const uint32_t*>(f.shared)[from] : static_cast<const uint16_t*>(f.shared)[from];
    };
    const int2 element = coordinates(thread);
    const uint32_t added = SECOND && thread < elements ? bits_at(thread, element) : 0;
    unsigned left_before = 0;

    bool down = !FIRST;
    Batch batch = {0, 0, 0, 0};
    if (!FIRST) batch = share.batch(0, f.room), walk = second.start(batch.group, 0, batch.groups * share.tiles, warp);
#pragma unroll 1
    while (true) {
        if (SECOND && down) {
            rows = Staging<2>(f.second.x + batch.from * f.second.x_row, f.second.x_row, batch.to - batch.from,
                           f.second.columns, f.second.blocks);
            rows.load(warp);
        }
        rows.finish(warp, staged, undo);
        __syncthreads();
        const int stride = stride_of(rows.blocks);
        const Steps steps = SECOND && down ? second : first;
        const float* row_scale = SECOND && down ? f.second.row_scale : f.first.row_scale;
        for (; walk.at < walk.end; steps.advance(walk)) {
            // A tile of a group whose token m has its columns in staged row row_of(m). Beyond the last token any row
            // will do: nobody takes the sum.
            const int4 now = s.groups[walk.group];
            const int halvings = SECOND && down ? 0 : f.halvings, tile = walk.tile >> halvings;
            const int piece = walk.tile - (tile << halvings);
            const auto row_of = [&](int m) {
                const int place = now.y + min(m, now.z - 1);
                return SECOND && down ? place - batch.from : s.token[place];
            };
            float alpha[2], scale[2], sum[4];  // asked for while there is time
            alpha[0] = SECOND && down ? f.second.alpha[now.x] : f.first.alpha[2 * now.x];
            alpha[1] = SECOND && down ? 0.0f : f.first.alpha[2 * now.x + 1];
            const int row0 = row_of(2 * t), row1 = row_of(2 * t + 1);
            scale[0] = row_scale == nullptr ? 1.0f : row_scale[row0 + batch.from];
            scale[1] = row_scale == nullptr ? 1.0f : row_scale[row1 + batch.from];
            const Parked park = {parked + (warp >> halvings << cuts_of(rows.blocks)) * 32 + lane, piece, warp, halvings};
            tile_product(sum, rows.blocks, piece, halvings, lane, staged + row_of(g) * stride + 32 * t,
                         undo + row0 * MOST_SLICES, undo + row1 * MOST_SLICES, ring, park);
            if (piece > 0) continue;
            alpha[0] *= w4::UNDO;
            alpha[1] *= w4::UNDO;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int m = 2 * t + i, place = now.y + m;
                if (m >= now.z) break;
                if (SECOND && down) {
                    bf16* result = results + (tile * pairs + place) * 16 + g;
                    result[0] = from_float<bf16>(sum[i] * alpha[0] * scale[i]);
                    result[8] = from_float<bf16>(sum[i + 2] * alpha[0] * scale[i]);
                } else {
                    f.first.out[static_cast<int64_t>(place) * 8 * f.first.rows + 8 * tile + g] =
                        activated(sum[i] * alpha[0] * scale[i], sum[i + 2] * alpha[1] * scale[i], f.first.limit,
                                  s.weight[place]);
                }
            }
        }
        if (!SECOND || batch.to >= share.places) break;
        if (FIRST && !down)
            left_before = all_blocks_meet(f.arrivals);
        else
            __syncthreads();  // nobody reads the rows any more
        down = true;
        batch = share.batch(batch.to, f.room);
        walk = second.start(batch.group, 0, batch.groups * share.tiles, warp);
    }
    if constexpr (SECOND) {
        __syncthreads();
        for (int i = thread; i < elements; i += FEW_THREADS) {
            const int2 at = i == thread ? element : coordinates(i);
            const bf16* result = results + at.x * pairs * 16 + i % 16;
            float y = 0.0f;
#pragma unroll 4
            for (int k = 0; k < f.second.topk; ++k) {
                const int place = s.places[at.y * f.second.topk + k];
                const float one = to_float(result[max(place, 0) * 16]);
                y += place < 0 ? 0.0f : one;
            }
            y += __uint_as_float((i == thread ? added : bits_at(i, at)) << (f.out_f32 ? 0 : 16));
            const int64_t width = 16 * static_cast<int64_t>(f.second.rows);
            const int64_t to = at.y * width + (share.first_tile + at.x) * 16 + i % 16;
            if (f.out_f32)
                static_cast<float*>(f.out)[to] = y;
            else
                static_cast<bf16*>(f.out)[to] = from_float<bf16>(y);
        }
        if (FIRST && thread == 0 && share.places > 0 && left_before == gridDim.x - 1)
            f.arrivals[0] = f.arrivals[1] = 0;
    }
}

}  // namespace dsv4::moe
