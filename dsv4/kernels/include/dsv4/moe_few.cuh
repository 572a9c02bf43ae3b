// Up to eight tokens: one launch sorts the pairs, multiplies with both projections and sums. There is a block per
// processor, and all of them must be running at once: two such launches side by side would wait for each other. Each
// sorts the few pairs for itself. A warp takes whole tiles, so nobody waits for another's sum: the block's share of
// tiles of gate and up, then, when all blocks have met, its rows of down for every expert, which it adds up per token.
// The copy engine does not wait there: down's weights follow into the rings behind those of gate and up. Slices,
// scaling and every order of addition are those of moe_stream.cuh, and so are the bits.
#pragma once
#include <dsv4/bulk.cuh>
#include <dsv4/dependent.cuh>
#include <dsv4/half.cuh>
#include <dsv4/mma.cuh>
#include <dsv4/moe_job.cuh>

namespace dsv4::moe {

constexpr int FEW_TOKENS = 8, FEW_PAIRS = 64, FEW_WARPS = 16, FEW_THREADS = FEW_WARPS * 32;
constexpr int CHUNK_BLOCKS = 4, CHUNK = CHUNK_BLOCKS * w4::BLOCK_BYTES, MOST_CHUNKS = 12;  // of a warp's ring
constexpr int MOST_SLICES = 16, NOBODY = 0x7fffffff;

struct Few {
    Job first, second;  // their plans are not used
    const int64_t* ids;
    const void* shared;  // bf16, or float where out is
    int64_t shared_row;
    void* out;
    unsigned* arrivals;  // [2], zero between launches
    int tokens, experts, out_f32;
    int room;    // rows of mid that are staged at a time
    int staged;  // bytes for staged rows
    int chunks;  // of all rings together
};

// How a row of K/64 blocks is cut into slices, each scaled and summed by itself: 2^cuts of them.
__host__ __device__ __forceinline__ int cuts_of(int blocks) { return blocks <= 64 ? 3 : 4; }
__host__ __device__ __forceinline__ int stride_of(int blocks) { return blocks * 128 + 16; }  // rows off others' banks

// The plan of moe_align.cuh, in shared memory.
struct FewPlan {
    uint64_t barriers[FEW_WARPS][MOST_CHUNKS];
    int4 groups[FEW_PAIRS];                                  // expert, first place, count
    int expert[FEW_PAIRS], places[FEW_PAIRS];                // by pair; by token, rising
    int token[FEW_PAIRS], pair[FEW_PAIRS], leads[FEW_PAIRS]; // by place; leads: the size of the group that begins here
    float weight[FEW_PAIRS];                                 // by place
    float alpha[FEW_PAIRS][3];                               // by group: gate, up, down
};

__device__ __forceinline__ uint64_t below(int bit) { return bit < 64 ? (uint64_t{1} << bit) - 1 : ~uint64_t{0}; }

// What a block has to do.
struct Share {
    uint64_t leaders;  // places at which a group begins
    int places;        // pairs whose expert exists
    int groups;
    int begin, end;          // tiles of gate and up, of all groups one after the other
    int first_tile, tiles;   // rows of down
    int warps, stages;       // warps that work, and how many chunks the ring of each has

    // Where a batch of whole groups ends that begins at place `from` and has at most `room` places (room >= TOKENS).
    __device__ __forceinline__ int batch_end(int from, int room) const {
        if (from + room >= places) return places;
        return 63 - __clzll(leaders & below(from + room + 1));
    }
    __device__ __forceinline__ int groups_before(int place) const { return __popcll(leaders & below(place)); }
};

template <bool FIRST>
__device__ __forceinline__ Share plan_few(const Few& f, FewPlan& s) {
    const int topk = f.first.topk, pairs = f.tokens * topk, pair = threadIdx.x, lane = pair % 32;
    int mine = NOBODY, place = 0, before = 0, alike = 0;
    float weight = 1.0f;
    if (pair < FEW_PAIRS) {
        if (pair < pairs) {
            const int64_t id = f.ids[pair];
            if (FIRST) weight = f.first.weights[pair];
            if (id >= 0 && id < f.experts) mine = static_cast<int>(id);
        }
        s.expert[pair] = mine;
        s.leads[pair] = 0;
    }
    __syncthreads();
    if (pair < pairs) {
        for (int other = 0; other < pairs; ++other) {
            const int theirs = s.expert[other];
            const bool same = theirs == mine;
            place += theirs < mine || (same && other < pair);
            before += same && other < pair;
            alike += same;
        }
        const int first = pair / topk * topk;
        int slot = 0;
        for (int other = first; other < first + topk; ++other) {
            const int theirs = s.expert[other];
            slot += theirs < mine || (theirs == mine && other < pair);
        }
        s.places[first + slot] = mine == NOBODY ? -1 : place;
        if (mine != NOBODY) {
            s.token[place] = pair / topk, s.pair[place] = pair, s.weight[place] = weight;
            if (before % TOKENS == 0) s.leads[place] = min(alike - before, TOKENS);
        }
    }
    __syncthreads();
    Share share;
    const auto bits = [&](bool low, bool high) {
        return __ballot_sync(ALL, low) | static_cast<uint64_t>(__ballot_sync(ALL, high)) << 32;
    };
    share.leaders = bits(s.leads[lane] != 0, s.leads[lane + 32] != 0);
    share.places = __popcll(bits(s.expert[lane] != NOBODY, s.expert[lane + 32] != NOBODY));
    share.groups = __popcll(share.leaders);
    if (pair < pairs && mine != NOBODY && before % TOKENS == 0)
        s.groups[share.groups_before(place)] = make_int4(mine, place, min(alike - before, TOKENS), 0);
    __syncthreads();
    return share;
}

// The chunks that a warp has still to ask for, in the order in which it takes its tiles. Lane 0 asks.
template <bool FIRST, bool SECOND>
struct Requests {
    const uint8_t* from = nullptr;
    int left = 0, index, group = 0, groups = 0, places = 0;  // down: of the batch; places: those in it and before it
    bool second = !FIRST;

    __device__ __forceinline__ explicit Requests(const Share& share, int warp)
        : index(FIRST ? share.begin + warp : warp) {}

    __device__ __forceinline__ void point(const Job& job, int expert, int tile) {
        from = job.tiles + (expert * static_cast<int64_t>(job.rows) + tile) * job.blocks * w4::BLOCK_BYTES;
        left = job.blocks * w4::BLOCK_BYTES;
    }
    __device__ __forceinline__ bool open(const Few& f, const FewPlan& s, const Share& share, int warp) {
        if (FIRST && !second) {
            if (index < share.end) {
                const int now = index / f.first.rows;
                point(f.first, s.groups[now].x, index - now * f.first.rows);
                index += share.warps;
                return true;
            }
            second = true, index = warp;
        }
        if constexpr (SECOND) {
            while (index >= groups * share.tiles) {
                if (places >= share.places) return false;
                group = share.groups_before(places);
                places = share.batch_end(places, f.room);
                groups = share.groups_before(places) - group;
                index = warp;
            }
            const int tile = index / groups;
            point(f.second, s.groups[group + index - tile * groups].x, share.first_tile + tile);
            index += share.warps;
        }
        return SECOND;
    }
    __device__ __forceinline__ void request(const Few& f, const FewPlan& s, const Share& share, int warp, uint32_t to,
                                            uint32_t barrier) {
        if (left == 0 && !open(f, s, share, warp)) return;
        const int bytes = min(left, CHUNK);
        bulk_load(to, from, bytes, barrier);
        from += bytes, left -= bytes;
    }
};

// Rows of BF16 into shared memory as FP16, every slice scaled by a power of two; undo [row][MOST_SLICES] takes it back.
// row_of(i): where row i is read. What another block has just written is not in this processor's own cache.
template <typename RowOf>
__device__ __forceinline__ void stage_rows(const Job& job, int rows, uint8_t* staged, float* undo, RowOf&& row_of) {
    constexpr int AT_ONCE = 4;
    const int lane = threadIdx.x % 32, cuts = cuts_of(job.blocks), stride = stride_of(job.blocks);
    const int tasks = rows << cuts;
    for (int begin = threadIdx.x / 32; begin < tasks; begin += FEW_WARPS * AT_ONCE) {
        uint4 low[AT_ONCE], high[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int task = begin + i * FEW_WARPS, slice = task & ((1 << cuts) - 1);
            const int first = slice * job.blocks >> cuts, stop = (slice + 1) * job.blocks >> cuts;
            const int column = first * 64 + lane * 16;
            low[i] = high[i] = make_uint4(0, 0, 0, 0);
            if (task < tasks && column < min(stop * 64, job.columns)) {  // columns are whole groups of 16
                const uint4* at = reinterpret_cast<const uint4*>(job.x + row_of(task >> cuts) * job.x_row + column);
                low[i] = __ldcg(at), high[i] = __ldcg(at + 1);
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int task = begin + i * FEW_WARPS, slice = task & ((1 << cuts) - 1), row = task >> cuts;
            if (task >= tasks) break;
            const int first = slice * job.blocks >> cuts, stop = (slice + 1) * job.blocks >> cuts;
            uint32_t x[8] = {low[i].x, low[i].y, low[i].z, low[i].w, high[i].x, high[i].y, high[i].z, high[i].w};
            uint32_t most = 0;
#pragma unroll
            for (int k = 0; k < 8; ++k) most = magnitudes(most, x[k]);
            const int shift = f16_shift(__reduce_max_sync(ALL, max(most & 0xFFFFu, most >> 16)));
            const float factor = power_of_two(shift);
#pragma unroll
            for (int k = 0; k < 8; ++k) x[k] = to_f16(x[k], factor);
            if (lane < 4 * (stop - first)) {
                uint4* to = reinterpret_cast<uint4*>(staged + row * stride + first * 128 + lane * 32);
                to[0] = make_uint4(x[0], x[1], x[2], x[3]);
                to[1] = make_uint4(x[4], x[5], x[6], x[7]);
            }
            if (lane == 0) undo[row * MOST_SLICES + slice] = power_of_two(-shift);
        }
    }
}

// A warp's ring of chunks.
struct FewRing {
    const uint8_t* bytes;
    uint32_t data, barriers;
    int stages, at = 0;
    uint32_t parity = 0;
};

// total = a tile, out of the ring, times 8 tokens. x: the lane's columns of token g. undo: of tokens 2 t and 2 t + 1.
template <typename Refill>
__device__ __forceinline__ void tile_product(float (&total)[4], int blocks, const uint8_t* x, const float* undo0,
                                             const float* undo1, FewRing& ring, Refill&& refill) {
    const int lane = threadIdx.x % 32, cuts = cuts_of(blocks);
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] = 0.0f;
    int slice = 0, stop = blocks >> cuts;
    while (stop == 0) ++slice, stop = (slice + 1) * blocks >> cuts;  // of less than a block each: some have none
    const auto multiply = [&](const uint8_t* block, const uint8_t* columns) {
        const w4::Lane part = w4::load(block, lane);
        const uint32_t words[4] = {part.codes.x, part.codes.y, part.codes.z, part.codes.w};
        uint32_t scale, scale8, a[4], b[8];
        load_b(b, columns);
        w4::scales(part.scales, scale, scale8);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            w4::dequantize(a, words[j], scale, scale8);
            mma_f16(j % 2 ? odd : even, a, b[2 * j], b[2 * j + 1]);
        }
    };
    const auto end_slice = [&](int done) {
        const float back[2] = {undo0[slice], undo1[slice]};
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i] += __fmul_rn(even[i] + odd[i], back[i % 2]), even[i] = odd[i] = 0.0f;
        while (stop <= done && done < blocks) ++slice, stop = (slice + 1) * blocks >> cuts;
    };
#pragma unroll 1
    for (int done = 0; done < blocks;) {
        barrier_wait(ring.barriers + 8 * ring.at, ring.parity);
        const uint8_t* block = ring.bytes + ring.at * CHUNK;
        if (stop - done >= CHUNK_BLOCKS) {
#pragma unroll
            for (int k = 0; k < CHUNK_BLOCKS; ++k) multiply(block + k * w4::BLOCK_BYTES, x + k * 128);
            done += CHUNK_BLOCKS, x += CHUNK_BLOCKS * 128;
            if (done == stop) end_slice(done);
        } else {
            const int last = min(blocks, done + CHUNK_BLOCKS);
#pragma unroll 1
            for (; done < last; block += w4::BLOCK_BYTES, x += 128) {
                multiply(block, x);
                if (++done == stop) end_slice(done);
            }
        }
        refill();
    }
}

// Every block has come here, and what they wrote is visible. The last one to go leaves zeros.
__device__ __forceinline__ void all_blocks_meet(unsigned* arrivals) {
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned here;
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(here) : "l"(arrivals) : "memory");
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(here) : "l"(arrivals) : "memory");
        while (here < gridDim.x);
        if (atomicAdd(arrivals + 1, 1) == gridDim.x - 1) arrivals[0] = arrivals[1] = 0;
    }
    __syncthreads();
}

template <bool FIRST, bool SECOND>
__global__ void __launch_bounds__(FEW_THREADS, 1) few(const __grid_constant__ Few f) {
    extern __shared__ __align__(128) uint8_t memory[];  // rings | staged rows | undo | results of down by row and place
    __shared__ FewPlan s;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int pairs = f.tokens * f.first.topk;
    uint8_t* staged = memory + f.chunks * CHUNK;
    float* undo = reinterpret_cast<float*>(staged + f.staged);
    bf16* results = reinterpret_cast<bf16*>(undo + max(f.tokens, f.room) * MOST_SLICES);
    if (lane == 0) {
        for (int i = 0; i < MOST_CHUNKS; ++i) barrier_init(shared_address(&s.barriers[warp][i]), 1);
        barriers_ready();
    }
    wait_for_previous();
    let_next_start();

    Share share = plan_few<FIRST>(f, s);
    const int64_t block = blockIdx.x, blocks = gridDim.x;
    const int64_t total = static_cast<int64_t>(share.groups) * f.first.rows;
    share.begin = FIRST ? total * block / blocks : 0, share.end = FIRST ? total * (block + 1) / blocks : 0;
    share.first_tile = SECOND ? f.second.rows * block / blocks : 0;
    share.tiles = SECOND ? f.second.rows * (block + 1) / blocks - share.first_tile : 0;
    const int most = max(max(share.end - share.begin, share.tiles * share.groups), 1);
    const int rounds = (most + FEW_WARPS - 1) / FEW_WARPS;
    share.warps = (most + rounds - 1) / rounds;
    share.stages = min(f.chunks / share.warps, MOST_CHUNKS);

    FewRing ring = {memory + warp * share.stages * CHUNK};
    ring.data = shared_address(ring.bytes), ring.barriers = shared_address(s.barriers[warp]);
    ring.stages = share.stages;
    Requests<FIRST, SECOND> requests(share, warp);
    const bool works = warp < share.warps;
    if (works && lane == 0)
        for (int i = 0; i < ring.stages; ++i)
            requests.request(f, s, share, warp, ring.data + i * CHUNK, ring.barriers + 8 * i);
    __syncwarp();
    const auto refill = [&] {
        __syncwarp();  // every lane has read the chunk
        if (lane == 0)
            requests.request(f, s, share, warp, ring.data + ring.at * CHUNK, ring.barriers + 8 * ring.at);
        if (++ring.at == ring.stages) ring.at = 0, ring.parity ^= 1;
    };
    for (int i = threadIdx.x; i < share.groups; i += FEW_THREADS) {
        const int expert = s.groups[i].x;
        for (int half = 0; FIRST && half < 2; ++half) s.alpha[i][half] = alpha_of<true>(f.first, expert, half);
        if (SECOND) s.alpha[i][2] = alpha_of<false>(f.second, expert, 0);
    }
    // A tile of a group whose token m has its columns in staged row row_of(m). Beyond the last token any row will do:
    // nobody takes the sum.
    float sum[4];
    const auto multiply = [&](const Job& job, const int4& now, auto&& row_of) {
        const auto row = [&](int m) { return row_of(min(m, now.z - 1)); };
        tile_product(sum, job.blocks, staged + row(g) * stride_of(job.blocks) + 32 * t, undo + row(2 * t) * MOST_SLICES,
                     undo + row(2 * t + 1) * MOST_SLICES, ring, refill);
    };

    if constexpr (FIRST) {
        const Job& job = f.first;
        stage_rows(job, f.tokens, staged, undo, [](int row) -> int64_t { return row; });
        __syncthreads();
        for (int at = share.begin + warp; works && at < share.end; at += share.warps) {
            const int group = at / job.rows, tile = at - group * job.rows;
            const int4 now = s.groups[group];
            multiply(job, now, [&](int m) { return s.token[now.y + m]; });
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int m = 2 * t + i, place = now.y + m;
                if (m >= now.z) break;
                const float scale = job.row_scale == nullptr ? 1.0f : job.row_scale[s.token[place]];
                job.out[static_cast<int64_t>(place) * 8 * job.rows + 8 * tile + g] =
                    activated(sum[i] * s.alpha[group][0] * scale, sum[i + 2] * s.alpha[group][1] * scale, job.limit,
                              s.weight[place]);
            }
        }
    }
    if constexpr (SECOND) {
        const Job& job = f.second;
        // The thread's first element of the result, while there is time.
        const int elements = share.tiles * f.tokens * 16;
        const auto row_of = [&](int i) { return (share.first_tile + i / 16 / f.tokens) * 16 + i % 16; };
        const auto shared_at = [&](int i) {
            const int64_t at = i / 16 % f.tokens * f.shared_row + row_of(i);
            return f.out_f32 ? static_cast<const float*>(f.shared)[at]
                             : to_float(static_cast<const bf16*>(f.shared)[at]);
        };
        const int mine = threadIdx.x;
        float added = 0.0f;
        if (mine < elements) added = shared_at(mine);
        if (FIRST) all_blocks_meet(f.arrivals);
        for (int from = 0, to; from < share.places; from = to) {
            to = share.batch_end(from, f.room);
            const int first = share.groups_before(from), groups = share.groups_before(to) - first;
            __syncthreads();  // nobody reads the rows before these any more
            stage_rows(job, to - from, staged, undo, [&](int row) -> int64_t { return from + row; });
            __syncthreads();
            for (int at = warp; works && at < groups * share.tiles; at += share.warps) {
                const int tile = at / groups, group = first + at - tile * groups;
                const int4 now = s.groups[group];
                multiply(job, now, [&](int m) { return now.y + m - from; });
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int m = 2 * t + i, place = now.y + m;
                    if (m >= now.z) break;
                    const float scale = job.row_scale == nullptr ? 1.0f : job.row_scale[place];
                    bf16* result = results + (tile * pairs + place) * 16 + g;
                    result[0] = from_float<bf16>(sum[i] * s.alpha[group][2] * scale);
                    result[8] = from_float<bf16>(sum[i + 2] * s.alpha[group][2] * scale);
                }
            }
        }
        __syncthreads();
        for (int i = mine; i < elements; i += FEW_THREADS) {
            const int token = i / 16 % f.tokens;
            const bf16* result = results + i / 16 / f.tokens * pairs * 16 + i % 16;
            float y = 0.0f;
            for (int k = 0; k < job.topk; ++k) {
                const int place = s.places[token * job.topk + k];
                if (place < 0) break;
                y += to_float(result[place * 16]);
            }
            y += i == mine ? added : shared_at(i);
            const int64_t to = token * 16 * static_cast<int64_t>(job.rows) + row_of(i);
            if (f.out_f32)
                static_cast<float*>(f.out)[to] = y;
            else
                static_cast<bf16*>(f.out)[to] = from_float<bf16>(y);
        }
    }
}

}  // namespace dsv4::moe
