// Attention of a decode step: sixteen heads of a token by a cluster of eight blocks, one for each split. Row lists are short
// enough that a split is one stage.
//
// What a step waits for is a chain: row numbers, entries, products, softmax, products, the other blocks. So each warp
// reads the row numbers itself and copies its entries to registers without a barrier; queries are normed while they
// come. The blocks' results meet in distributed shared memory.
#pragma once
#include <dsv4/attention_few.cuh>
#include <dsv4/cluster.cuh>
#include <dsv4/dependent.cuh>

namespace dsv4::attention::few {

constexpr int OUT_ROW = DH + 8;  // floats between rows of a partial result

template <int TILES>
struct Cluster {
    static constexpr int HG = 16;
    using S = Shared<HG, TILES>;
    static_assert(HG * OUT_ROW * 4 <= (S::STAGE + HG) * ROW, "a partial result fits where entries and queries were");

    const Arguments& a;
    S& s;
    Block<HG, TILES> block;

    __device__ Cluster(const Arguments& a, S& s, int64_t token, int rank) : a(a), s(s), block(a, s, token, rank) {}

    __device__ void run(int head) {
        const Lists<TILES> lists(a, block.token, block.rank);
        const int warp = block.warp, lane = block.lane;
        int rows[Lists<TILES>::WORDS];
        lists.read(rows, 0, lane);
        float2 turns[4];
        Query q;
        Bytes bytes[TILES];
        load_query(q, a, block.token, head + warp, lane);
        if (a.turn != nullptr) load_turns(turns, a, block.token, lane);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const int row = lists.of_warp(rows, tile, warp);
            const Source from = lists.source(0, tile);
            bytes[tile] = {};
            if (row < 0 || !from.packed) continue;
            bytes[tile] = Bytes::of(from.data + static_cast<int64_t>(row) * kv::ENTRY_BYTES, lane);
        }
        if (a.turn != nullptr) norm_rope(q, turns, a, lane);
        put_query(s.q + warp * ROW, q, lane);
        block.clear();
        block.look(rows);
        const int used = block.used_tiles();
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            if (tile >= used) break;
            if (lists.source(0, tile).packed) block.put(tile, bytes[tile]);
        }
        block.copy_plain(lists, 0);
        __syncthreads();
        if (used) {
            block.score(used);
            __syncthreads();
            block.softmax(used);
            __syncthreads();
            block.accumulate(used);
        }
        __syncthreads();  // entries and queries are no longer read
    }

    // Each block of the cluster adds up the partial results of two heads and writes them; a thread has two channels.
    __device__ void combine(int head) {
        float* partial = reinterpret_cast<float*>(s.entries);
        const auto& sums = block.sums[0];
        const int g = block.lane / 4, t = block.lane % 4;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            float* to = partial + g * OUT_ROW + block.warp * 32 + n * 8 + 2 * t;
            *reinterpret_cast<float2*>(to) = make_float2(sums[n][0], sums[n][1]);
            *reinterpret_cast<float2*>(to + 8 * OUT_ROW) = make_float2(sums[n][2], sums[n][3]);
        }
        cluster_arrive();
        constexpr int PAIRS = DH / 2;
        static_assert(HG * PAIRS == SPLITS * THREADS, "one pair of channels a thread");
        const int channel = threadIdx.x % PAIRS * 2, mine = block.rank * (HG / SPLITS) + threadIdx.x / PAIRS;
        const bool there = head + mine < a.heads;
        const float2 back = turn_back(a, block.token, channel);
        const float sink = there ? __fmul_rn(a.sink[head + mine], LOG2E) : 0.0f;
        cluster_wait();
        float2 seen[SPLITS], parts[SPLITS];
#pragma unroll
        for (int r = 0; r < SPLITS; ++r) {
            seen[r] = peer_pair(s.seen[mine], r);
            parts[r] = peer_pair(partial + mine * OUT_ROW + channel, r);
        }
        cluster_arrive();  // this thread has read all it wants of its peers
        float top = LOWEST, total = 0.0f;
        float2 sum = {};
#pragma unroll
        for (int r = 0; r < SPLITS; ++r) top = fmaxf(top, seen[r].x);
#pragma unroll
        for (int r = 0; r < SPLITS; ++r) {
            const float weight = exp2f(seen[r].x - top);
            total = fmaf(seen[r].y, weight, total);
            sum.x = fmaf(parts[r].x, weight, sum.x), sum.y = fmaf(parts[r].y, weight, sum.y);
        }
        total += exp2f(sink - top);
        if (there)
            *reinterpret_cast<uint32_t*>(a.out + (block.token * a.heads + head + mine) * DH + channel) =
                result(sum.x / total, sum.y / total, back, channel >= DH - a.rope);
        cluster_wait();  // nobody leaves while its shared memory is read
    }

    static __device__ float2 peer_pair(const float* mine, int rank) {
        const uint64_t both = peer_value(reinterpret_cast<const uint64_t*>(mine), rank);
        return make_float2(__uint_as_float(static_cast<uint32_t>(both)), __uint_as_float(static_cast<uint32_t>(both >> 32)));
    }
};

template <int TILES>
__global__ void __launch_bounds__(THREADS, 1) sparse_attention_cluster(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) uint8_t memory[];
    take_turn();
    const int unit = blockIdx.x / SPLITS, head = unit % a.groups * Cluster<TILES>::HG;
    Cluster<TILES> cluster(a, *reinterpret_cast<typename Cluster<TILES>::S*>(memory), unit / a.groups, cluster_rank());
    cluster.run(head);
    cluster.combine(head);
}

}  // namespace dsv4::attention::few
