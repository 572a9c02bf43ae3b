// Attention of a decode step of more rows than clusters find room for, or of long rows: units of work are the splits of a
// row's heads, or chunks of those, and as many blocks as there are processors walk a few each, one after the other. The
// packed entries of the next stage are copied to shared memory while the one at hand is worked on. Each unit leaves a part,
// its sums and what it has seen, in memory; a second kernel adds the parts up, in the order of the splits.
#pragma once
#include <dsv4/attention_few.cuh>
#include <dsv4/dependent.cuh>

namespace dsv4::attention::few {

// What units leave, in their order: [rows, groups, SPLITS, chunks].
constexpr int MERGE_THREADS = 256;
static_assert(CHUNKS * SPLITS == 32, "a lane has what was seen of one part");
struct Parts {
    float* sums;   // [units, HG, 512]
    float2* seen;  // [units, HG] as Shared::seen; a negative sum: nothing is there
    int units, chunks;  // chunks: 1, or CHUNKS if the lists have room for more than a stage of a split
};

template <int HG, int TILES>
struct WalkShared : Shared<HG, TILES> {
    alignas(16) uint8_t packed[TILES * TILE * kv::ENTRY_BYTES];
};

template <int HG, int TILES>
struct Walk {
    using S = WalkShared<HG, TILES>;
    using Lists = few::Lists<TILES>;
    static constexpr int STAGE = S::STAGE, WORDS = Lists::WORDS;

    const Arguments& a;
    const Parts& parts;
    S& s;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int rows[WORDS];  // of the stage that is copied

    __device__ Walk(const Arguments& a, const Parts& parts, S& s) : a(a), parts(parts), s(s) {}

    // Starts to copy the warp's packed entries of the stage whose rows have been read.
    __device__ void fetch(const Lists& lists, int stage) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const int row = Lists::of_warp(rows, tile, warp);
            const Source from = lists.source(stage, tile);
            if (row < 0 || !from.packed) continue;
            const uint8_t* entry = from.data + static_cast<int64_t>(row) * kv::ENTRY_BYTES;
            uint8_t* to = packed(tile);
#pragma unroll
            for (int i = lane; i < kv::ENTRY_BYTES / 8; i += 32) copy_async8(to + 8 * i, entry + 8 * i);
        }
    }
    __device__ uint8_t* packed(int tile) const { return s.packed + (tile * TILE + warp) * kv::ENTRY_BYTES; }

    // Stages up to the split's last entry; one if there is none. Ends with a barrier.
    __device__ int count(const Lists& lists) {
        const int tiles = (lists.local_positions + lists.pool.width + TILE - 1) / TILE - lists.split;
        const int slots = (tiles + SPLITS - 1) / SPLITS * TILE;
        int last = 0;
#pragma unroll 4
        for (int i = STAGE + threadIdx.x; i < slots; i += THREADS)
            if (lists.row_at(0, i) >= 0) last = i;
        last = __reduce_max_sync(ALL, last);
        if (lane == 0) s.last[warp] = last;
        __syncthreads();
        return __reduce_max_sync(ALL, s.last[lane % WARPS]) / STAGE + 1;
    }

    __device__ void take_queries(int64_t token, int head) {
        constexpr int COUNT = HG / WARPS;
        Query q[COUNT];
        float2 turns[4];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) load_query(q[i], a, token, head + i * WARPS + warp, lane);
        if (a.turn != nullptr) load_turns(turns, a, token, lane);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (a.turn != nullptr) norm_rope(q[i], turns, a, lane);
            put_query(s.q + (i * WARPS + warp) * ROW, q[i], lane);
        }
    }

    __device__ void leave(const Block<HG, TILES, S>& block, int unit, bool found) const {
        const int64_t first = static_cast<int64_t>(unit) * HG;
        if (threadIdx.x < HG)
            parts.seen[first + threadIdx.x] = make_float2(s.seen[threadIdx.x][0], found ? s.seen[threadIdx.x][1] : -1.0f);
        if (!found) return;
        float* to = parts.sums + (first + lane / 4) * DH + warp * 32 + lane % 4 * 2;
#pragma unroll
        for (int mt = 0; mt < HG / 16; ++mt)
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const float(&sums)[4] = block.sums[mt][n];
                float* at = to + mt * 16 * DH + n * 8;
                *reinterpret_cast<float2*>(at) = make_float2(sums[0], sums[1]);
                *reinterpret_cast<float2*>(at + 8 * DH) = make_float2(sums[2], sums[3]);
            }
    }

    // There is nothing in these units. Ends with a barrier.
    __device__ void pass_over(int unit, int end) const {
        for (int i = unit * HG + threadIdx.x; i < end * HG; i += THREADS) parts.seen[i] = make_float2(LOWEST, -1.0f);
        __syncthreads();
    }

    __device__ Lists lists_of(int unit) const {
        return Lists(a, unit / (a.groups * SPLITS * parts.chunks), unit / parts.chunks % SPLITS);
    }

    // Units `first` up to `end`, of which there is one at least.
    __device__ void run(int first, int end) {
        const int chunks = parts.chunks, whole = SPLITS * chunks;  // units of some heads of a row
        const bool longer = few::longer<TILES>(a);
        Block<HG, TILES, S> block(a, s, 0, 0);
        Lists lists = lists_of(first);
        int unit = first, heads = -1, stages = longer ? count(lists) : 1, stage = unit % chunks * chunk_of(stages);
        if (stage >= stages) {
            const int next = (unit / chunks + 1) * chunks;
            pass_over(unit, min(next, end));
            if (next >= end) return;
            unit = next, stage = 0, lists = lists_of(unit), stages = count(lists);
        }
        lists.read(rows, stage, lane);
        fetch(lists, stage);
        while (true) {
            if (unit / whole != heads) {
                heads = unit / whole;
                take_queries(heads / a.groups, heads % a.groups * HG);
            }
            const int stop = min((unit % chunks + 1) * chunk_of(stages), stages);
            const int next = stop < stages ? unit + 1 : (unit / chunks + 1) * chunks;
            const Lists ahead = stop < stages ? lists : lists_of(next);
            bool found = false;
            block.clear();
#pragma unroll 1
            for (; stage < stop; ++stage) {
                block.look(rows);
                const int used = block.used_tiles();
                copies_wait();
                __syncwarp();
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    if (tile >= used) break;
                    if (lists.source(stage, tile).packed) block.put(tile, Bytes::of(packed(tile), lane));
                }
                block.copy_plain(lists, stage);
                const bool last = stage + 1 == stop, more = !last || next < end;
                const Lists from = last ? ahead : lists;
                const int coming = last && stop == stages ? 0 : stage + 1;
                if (more) from.read(rows, coming, lane);
                __syncthreads();
                if (used) block.score(used);
                if (more) fetch(from, coming);
                if (used) {
                    __syncthreads();
                    block.softmax(used);
                    __syncthreads();
                    block.accumulate(used);
                    found = true;
                }
                if (last) leave(block, unit, found);
                __syncthreads();  // entries, queries and what was seen are no longer read
            }
            if (next > unit + 1) pass_over(unit + 1, min(next, end));
            if (next >= end) return;
            if (stop == stages) {
                lists = ahead, stage = 0;
                if (longer) stages = count(lists);
            }
            unit = next;
        }
    }
};

// Blocks take `each` units.
template <int HG, int TILES>
__global__ void __launch_bounds__(THREADS, 1) sparse_attention_parts(const __grid_constant__ Arguments a,
                                                                     const __grid_constant__ Parts parts, int each) {
    extern __shared__ __align__(16) uint8_t memory[];
    take_turn();
    Walk<HG, TILES> walk(a, parts, *reinterpret_cast<WalkShared<HG, TILES>*>(memory));
    const int first = blockIdx.x * each;
    walk.run(first, min(first + each, parts.units));
}

// Adds up the parts: chunk by chunk, in each the splits in their order. A thread has four channels of a head.
template <int HG>
__global__ void __launch_bounds__(MERGE_THREADS) sparse_attention_merge(const __grid_constant__ Arguments a,
                                                                        const __grid_constant__ Parts parts, int heads) {
    constexpr int COLUMNS = DH / 4;
    take_turn();
    const int at = blockIdx.x * (MERGE_THREADS / COLUMNS) + threadIdx.x / COLUMNS;
    if (at >= heads) return;
    const int lane = threadIdx.x % 32, channel = threadIdx.x % COLUMNS * 4, token = at / a.heads, head = at % a.heads;
    const int64_t first = static_cast<int64_t>(token * a.groups + head / HG) * SPLITS * parts.chunks;
    const auto part = [&](int chunk, int split) { return (first + split * parts.chunks + chunk) * HG + head % HG; };
    float2 seen = make_float2(LOWEST, -1.0f);  // of chunk lane / SPLITS
    if (lane < SPLITS * parts.chunks) seen = parts.seen[part(lane / SPLITS, lane % SPLITS)];
    const unsigned there = __ballot_sync(ALL, !(seen.y < 0.0f));
    const float sink = __fmul_rn(a.sink[head], LOG2E);  // not fused with what is taken from it
    float2 back[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) back[k] = turn_back(a, token, channel + 2 * k);
    const float top = warp_max(seen.x), weight = exp2f(seen.x - top);
    float total = 0.0f, sum[4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS && there >> chunk * SPLITS != 0; ++chunk) {
        float4 values[SPLITS];
#pragma unroll
        for (int r = 0; r < SPLITS; ++r) {
            values[r] = {};
            if (there >> (chunk * SPLITS + r) & 1)
                values[r] = *reinterpret_cast<const float4*>(parts.sums + part(chunk, r) * DH + channel);
        }
#pragma unroll
        for (int r = 0; r < SPLITS; ++r) {
            const float w = __shfl_sync(ALL, weight, chunk * SPLITS + r);
            const float y = __shfl_sync(ALL, seen.y, chunk * SPLITS + r);
            if (!(there >> (chunk * SPLITS + r) & 1)) continue;
            total = fmaf(y, w, total);
            sum[0] = fmaf(values[r].x, w, sum[0]), sum[1] = fmaf(values[r].y, w, sum[1]);
            sum[2] = fmaf(values[r].z, w, sum[2]), sum[3] = fmaf(values[r].w, w, sum[3]);
        }
    }
    total += exp2f(sink - top);
    *reinterpret_cast<uint2*>(a.out + static_cast<int64_t>(at) * DH + channel) =
        make_uint2(result(sum[0] / total, sum[1] / total, back[0], channel >= DH - a.rope),
                   result(sum[2] / total, sum[3] / total, back[1], channel + 2 >= DH - a.rope));
}

}  // namespace dsv4::attention::few
