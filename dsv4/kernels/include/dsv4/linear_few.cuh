// Up to eight tokens: bound by how fast weights come and by how many instructions unpack them.
//
// A unit is TILES tiles of a part (two share what a warp reads of the tokens, and one is multiplied while the other is
// unpacked) times one slice, or with OWN all slices. Tiles go to clusters of blocks, each block of a cluster takes some
// of the slices, and its warps take units in turn; the slices of a tile meet in shared memory, of the cluster's blocks,
// and are added up in their order. With OWN a warp keeps the sum of its tiles, and a cluster is one block.
// A block leaves room beside it for a smaller kernel in front, not for a second one of its own: two would fill one
// processor and leave another idle.
#pragma once
#include <dsv4/cluster.cuh>
#include <dsv4/dependent.cuh>
#include <dsv4/linear.cuh>

namespace dsv4::linear {

constexpr int FEW_WARPS = 16, FEW_THREADS = FEW_WARPS * 32, FEW_TOKENS = 8;

struct Few {
    Parts parts;
    uint32_t cuts[MAX_GRID + 1];  // cluster c takes the tiles cuts[c] .. cuts[c + 1]
    int tokens, columns, blocks, slices;
    int ranks;   // blocks of a cluster
    int window;  // slices of a block, at most
    int batch;   // tiles whose sums wait in shared memory at a time
    int stages;  // of each warp's ring
    int cold;    // this kernel's code is not in the caches
};

// Consecutive tiles of one part.
struct Run {
    int part, tile, tiles;
};

// The runs of a cluster, in order, of at most `batch` tiles.
struct Runs {
    int at, end, part;
    __device__ __forceinline__ explicit Runs(const Few& task, int cluster)
        : at(task.cuts[cluster]), end(task.cuts[cluster + 1]), part(0) {}

    __device__ __forceinline__ bool next(const Few& task, Run& r) {
        if (at >= end) return false;
        while (part + 1 < task.parts.count && at >= task.parts.part[part + 1].first_tile) ++part;
        const int stop = part + 1 < task.parts.count ? task.parts.part[part + 1].first_tile : task.parts.tiles;
        r.part = part;
        r.tile = at - task.parts.part[part].first_tile;
        r.tiles = min(min(stop, end) - at, task.batch);
        at += r.tiles;
        return true;
    }
};

// The slices of a block, and how its warps take units: unit i of a run is group i / count of TILES tiles, slice i % count.
struct Slices {
    int first, count, groups, rest;  // a warp's next unit is FEW_WARPS on: so many groups and slices
    __device__ __forceinline__ Slices(const Few& task, int rank, bool own)
        : first(task.slices * rank / task.ranks), count(task.slices * (rank + 1) / task.ranks - first) {
        if (own) count = 1;
        groups = FEW_WARPS / count, rest = FEW_WARPS - groups * count;
    }
};

struct Unit {
    int group, slice;
    __device__ __forceinline__ Unit(const Slices& s, int warp) : group(warp / s.count), slice(warp - group * s.count) {}
    __device__ __forceinline__ void advance(const Slices& s) {
        group += s.groups, slice += s.rest;
        if (slice >= s.count) slice -= s.count, ++group;
    }
};

// Where a warp's requests are. In shared memory: lane 0 looks at it once per unit, and registers are scarce.
struct Place {
    Runs runs;
    Run run;
    Unit start, unit;
    __device__ __forceinline__ Place(const Few& task, const Slices& s, int cluster, int warp)
        : runs(task, cluster), run{}, start(s, warp), unit(start) {}
};

// What lane 0 has still to ask the copy engine for.
template <int TILES, bool OWN, bool ONE>
struct FewRequests {
    const uint8_t* from = nullptr;
    int left = 0, format = NVFP4;  // left: bytes of a tile, -1 when nothing is left at all
    bool pair = false;

    __device__ __forceinline__ bool open(const Few& task, const Slices& s, Place& at) {
        while (at.unit.group * TILES >= at.run.tiles) {
            if (!at.runs.next(task, at.run)) {
                left = -1;
                return false;
            }
            at.unit = at.start;
        }
        const Part& part = task.parts.part[at.run.part];
        if (!ONE) format = part.format;
        const int block = block_bytes(format), first = OWN ? 0 : (s.first + at.unit.slice) * SLICE_BLOCKS;
        const int tile = at.unit.group * TILES;
        from = part.tiles + (static_cast<int64_t>(at.run.tile + tile) * task.blocks + first) * block;
        left = (OWN ? task.blocks : min(task.blocks - first, SLICE_BLOCKS)) * block;
        pair = TILES == 2 && tile + 1 < at.run.tiles;
        at.unit.advance(s);
        return true;
    }
    __device__ __forceinline__ void request(const Few& task, const Slices& s, Place& at, uint32_t to, uint32_t full) {
        if (left <= 0 && (left < 0 || !open(task, s, at))) return;
        const int now = min(left, chunk_blocks(format) * block_bytes(format));
        bulk_expect(full, pair ? 2 * now : now);
        bulk_copy(to, from, now, full);
        if (TILES == 2 && pair) bulk_copy(to + CHUNK, from + task.blocks * block_bytes(format), now, full);
        from += now, left -= now;
    }
};

// ONE: all parts are NVFP4, and nothing else is compiled in.
template <int TILES, bool OWN, bool ONE>
__global__ void __launch_bounds__(FEW_THREADS, OWN ? 1 : 2) linear_few(const __grid_constant__ Few task) {
    constexpr int STAGE = Ring<TILES>::STAGE;
    extern __shared__ __align__(128) uint8_t memory[];  // rings | spare | x | slots | undo | barriers | places
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int ranks = OWN ? 1 : task.ranks, rank = ranks == 1 ? 0 : cluster_rank(), cluster = blockIdx.x / ranks;
    const Slices slices(task, rank, OWN);
    const int staged = OWN ? task.slices : slices.count, stride = task.window * 1024 + 16;

    uint8_t* const x = memory + (FEW_WARPS * task.stages + 1) * STAGE;  // nobody writes to the spare stage
    float* const slots = reinterpret_cast<float*>(x + task.tokens * stride);  // [tile][window][T][16]
    float* const undo = slots + (OWN ? 0 : task.batch * task.window * task.tokens * TILE_ROWS);
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(undo + task.window * FEW_TOKENS) + warp * task.stages;
    Place* const places = reinterpret_cast<Place*>(barriers + (FEW_WARPS - warp) * task.stages);

    uint8_t* const ring_bytes = memory + warp * task.stages * STAGE;
    Ring<TILES> ring = {shared_address(ring_bytes), shared_address(barriers), ring_bytes, task.stages, 0, 0};
    FewRequests<TILES, OWN, ONE> requests;
    if (lane < ring.stages) {
        barrier_init(ring.full + lane * 8, 1);
        barriers_ready();
    }
    if (lane == 0) places[warp] = Place(task, slices, cluster, warp);
    __syncwarp();
    // Begins with filling the ring and, where the code is cold, a rehearsal: a chunk of what happens to lie in the spare
    // stage, times what lies where the tokens will be. Nothing comes of it but that code and arguments are at hand when
    // the turn comes.
    bool real = false;
    const auto refill = [&](Ring<TILES>& r) {
        __syncwarp();  // every lane has read the stage
        if (!real) return;
        if (lane == 0) requests.request(task, slices, places[warp], r.data + r.at * STAGE, r.full + r.at * 8);
        r.advance();
    };
    if (lane == 0)
#pragma unroll 1
        for (int i = 0; i < ring.stages; ++i)
            requests.request(task, slices, places[warp], ring.data + i * STAGE, ring.full + i * 8);
    __syncwarp();

    const int columns = lane_columns(task.tokens, stride);
    Run run = {};
    const bf16* seen = nullptr;
    bool plain = false;
    float sum[TILES][4];
    // sum = a slice, the block's `place`-th, of a group's tiles; its scaling undone
    const auto multiply = [&](const Part& part, int group, int tiles, int place) {
        const int slice = OWN ? place : slices.first + place, format = ONE ? NVFP4 : part.format;
        const int count = min(task.blocks - slice * SLICE_BLOCKS, real ? SLICE_BLOCKS : chunk_blocks(format));
#pragma unroll
        for (auto& tile : sum) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
        float all[TILES] = {};  // scales of FP8, a lane those of 128 columns
        if (format == FP8 && lane < SLICE_SCALES)
#pragma unroll
            for (int i = 0; i < TILES; ++i)
                all[i] = scale_of(part, run.tile + group * TILES + min(i, tiles - 1), slice * SLICE_SCALES + lane);
        const auto scales = [&](float (&scale)[TILES], int left) {
#pragma unroll
            for (int i = 0; i < TILES; ++i) scale[i] = __shfl_sync(0xFFFFFFFFu, all[i], (count - left) / 2);
        };
        slice_product(
            sum, format, count, x + place * 1024 + columns, lane, ring, scales, [](Ring<TILES>&) { return false; }, refill,
            least_of(format));
        undo_scaling(sum, undo_of(format), undo + place * FEW_TOKENS + 2 * t);
    };
#pragma unroll 1
    for (int pass = task.cold ? 0 : 1; pass < 2; ++pass) {
        real = ring.live = pass == 1;
        ring.bytes = memory + (real ? warp : FEW_WARPS) * task.stages * STAGE;
        if (real) {
            __syncthreads();  // nobody rehearses any more
            wait_for_previous();
            let_next_start();
        }
        Runs runs(task, cluster);
        while (runs.next(task, run)) {
            const Part& part = task.parts.part[run.part];
            if (real && (part.x != seen || (part.format == PLAIN) != plain)) {
                if (seen != nullptr) __syncthreads();  // nobody reads the tokens before these any more
                seen = part.x, plain = part.format == PLAIN;
                stage_slices<FEW_WARPS>(part, task.tokens, task.columns, slices.first, staged, (1 << 16) / staged + 1, x,
                                        stride, undo);
                __syncthreads();
            }
            Unit unit(slices, warp);
            for (; unit.group * TILES < (real ? run.tiles : 1); unit.advance(slices)) {
                const int first = unit.group * TILES, tiles = min(run.tiles - first, TILES);
                if (OWN) {
                    float total[TILES][4] = {};
#pragma unroll 1
                    for (int place = 0; place < (real ? task.slices : 1); ++place) {
                        multiply(part, unit.group, tiles, place);
#pragma unroll
                        for (int k = 0; k < TILES; ++k)
#pragma unroll
                            for (int i = 0; i < 4; ++i) total[k][i] += sum[k][i];
                    }
#pragma unroll
                    for (int k = 0; k < TILES; ++k)
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            if (real && k < tiles && 2 * t + i % 2 < task.tokens)
                                put(part, (run.tile + first + k) * TILE_ROWS + g + i / 2 * 8, 2 * t + i % 2, total[k][i]);
                } else {
                    multiply(part, unit.group, tiles, unit.slice);
#pragma unroll
                    for (int k = 0; k < TILES; ++k) {
                        float* slot = slots + ((first + k) * task.window + unit.slice) * task.tokens * TILE_ROWS + g;
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            if (k < tiles && 2 * t + i % 2 < task.tokens)
                                slot[(2 * t + i % 2) * TILE_ROWS + i / 2 * 8] = sum[k][i];
                    }
                }
            }
            if (!real) {
                all_at_hand(part.x, part.x_stride, part.x_wide, part.out, part.alpha);
                all_at_hand(part.row_scale, part.out_stride, part.out_f32, part.rows);
                break;
            }
            if (OWN) continue;
            if (ranks == 1) __syncthreads();
            else cluster_barrier();
            const int all = run.tiles * task.tokens * TILE_ROWS;
            for (int i = all * rank / ranks + threadIdx.x; i < all * (rank + 1) / ranks; i += FEW_THREADS) {
                const int row = i % TILE_ROWS, token = i / TILE_ROWS % task.tokens, tile = i / TILE_ROWS / task.tokens;
                const float* slot = slots + (tile * task.window * task.tokens + token) * TILE_ROWS + row;
                const int step = task.tokens * TILE_ROWS;
                float y = 0.0f;
                if (ranks == 1) {
#pragma unroll 4
                    for (int slice = 0; slice < task.slices; ++slice) y += slot[slice * step];
                } else {
                    for (int peer = 0, slice = 0; peer < ranks; ++peer) {
                        const int stop = task.slices * (peer + 1) / ranks;
#pragma unroll 4
                        for (int place = 0; slice < stop; ++place, ++slice) y += peer_value(slot + place * step, peer);
                    }
                }
                put(part, (run.tile + tile) * TILE_ROWS + row, token, y);
            }
            if (ranks == 1) __syncthreads();  // the next run writes over the slots
            else cluster_barrier();           // and nobody leaves while its slots are read
        }
    }
}

template <int TILES, bool OWN, bool ONE>
static cudaError_t run_few(const Few& task, int grid, size_t shared_bytes, cudaStream_t stream) {
    auto kernel = linear_few<TILES, OWN, ONE>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
    return launch_dependent_clusters(kernel, grid, FEW_THREADS, shared_bytes, task.ranks, stream, task);
}

// height: tiles of a unit; two of NVFP4 only, and with OWN one of NVFP4 only.
static cudaError_t start_few(const Few& task, int grid, int height, bool own, size_t shared_bytes, cudaStream_t stream) {
    bool one = true;
    for (int i = 0; i < task.parts.count; ++i) one = one && task.parts.part[i].format == NVFP4;
    if (own && height == 1) return one ? run_few<1, true, true>(task, grid, shared_bytes, stream) : cudaErrorInvalidValue;
    if (own) return one ? run_few<2, true, true>(task, grid, shared_bytes, stream)
                        : run_few<2, true, false>(task, grid, shared_bytes, stream);
    if (height == 2) return one ? run_few<2, false, true>(task, grid, shared_bytes, stream) : cudaErrorInvalidValue;
    return one ? run_few<1, false, true>(task, grid, shared_bytes, stream)
               : run_few<1, false, false>(task, grid, shared_bytes, stream);
}

}  // namespace dsv4::linear
