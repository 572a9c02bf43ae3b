// sparse_attention of a decode step. Some heads of a token go to a group of eight blocks, as in attention_few.cuh to a
// cluster: eight heads, or sixteen where there would be more of them than groups. The blocks tell each other their
// results through the L2 cache in one trip (exchange.cuh), and each adds up those of an eighth of the heads.
#pragma once
#include <cstring>

#include <dsv4/attention_few.cuh>
#include <dsv4/exchange.cuh>
#include <dsv4/persistent/meeting.cuh>
#include <dsv4/persistent/memory.cuh>

namespace dsv4::persistent {

namespace few = attention::few;
static_assert(few::THREADS == THREADS && few::SPLITS == GROUP, "one way to share the work");

constexpr int PAIRS = attention::DH / 2;  // words of a head and a block
constexpr int64_t ROUND = 16 * GROUP * PAIRS;  // words of one turn of a group

struct Attention {
    attention::Arguments a;
    int rows, heads;        // heads: of a unit
    exchange::Word* words;  // [groups, 2, ROUND]
    uint32_t* turns;        // [groups] the last turn of each
};

// Bytes of scratch: zeros before its first use, then left alone. Phases of all programs of such a grid may share it.
constexpr int64_t attention_scratch(int grid) {
    return grid / GROUP * (2 * ROUND * static_cast<int64_t>(sizeof(exchange::Word)) + 4);
}

// A unit of work; words: of this turn.
template <int HG>
struct Unit {
    static constexpr int TILES = 5, MINE = HG / GROUP;
    using Memory = few::Shared<HG, TILES, HG == 8 ? 4 : 2>;
    using Block = few::Block<HG, TILES, Memory>;

    // A word has two channels of a head, and either number of what the block has seen of it: the largest logit in an
    // even word, the sum in an odd one.
    static __device__ __forceinline__ void tell(const Block& block, exchange::Word* words, uint32_t turn) {
        const int g = block.lane / 4, t = block.lane % 4;
        const auto put = [&](int head, int pair, float x, float y) {
            const float values[exchange::PER_WORD] = {x, y, block.s.seen[head][pair % 2]};
            exchange::tell(words + (head * GROUP + block.rank) * PAIRS + pair, values, turn);
        };
#pragma unroll
        for (int n = 0; n < (HG == 8 ? 2 : 4); ++n) {
            const float(&sums)[4] = block.sums[0][n];
            if constexpr (HG == 8) {  // channels g and g + 8 of sixteen
                const int pair = (block.warp * 2 + n) * 8 + g;
                put(2 * t, pair, sums[0], sums[2]);
                put(2 * t + 1, pair, sums[1], sums[3]);
            } else {
                const int pair = block.warp * 16 + n * 4 + t;
                put(g, pair, sums[0], sums[1]);
                put(g + 8, pair, sums[2], sums[3]);
            }
        }
    }

    static __device__ void run(const attention::Arguments& a, int64_t token, int head, exchange::Word* words,
                               uint32_t turn) {
        Block block(a, work<Memory>(), token, blockIdx.x % GROUP);
        block.run_in_turn(head);
        const int pair = threadIdx.x % PAIRS, mine = block.rank * MINE + threadIdx.x / PAIRS, odd = pair % 2;
        const int channel = HG == 8 ? pair / 8 * 16 + odd * 8 + pair % 8 - odd : 2 * pair;  // that is written
        const bool reads = threadIdx.x < MINE * PAIRS, there = reads && head + mine < a.heads;
        const float2 back = attention::turn_back(a, token, channel);
        const float sink = there ? a.sink[head + mine] * few::LOG2E : 0.0f;
        tell(block, words, turn);
        if (!reads) return;
        const exchange::Word* from = words + mine * GROUP * PAIRS + pair;
        exchange::Word told[GROUP];
        float2 seen[GROUP];
        float parts[GROUP][2], merged[2];
        bool here;
        do {
#pragma unroll
            for (int r = 0; r < GROUP; ++r) told[r] = exchange::look(from + r * PAIRS);
            here = true;
#pragma unroll
            for (int r = 0; r < GROUP; ++r) here &= told[r].turn == turn;
        } while (!here);
        __syncwarp();
#pragma unroll
        for (int r = 0; r < GROUP; ++r) {
            const float own = told[r].values[2], other = __shfl_xor_sync(attention::ALL, own, 1);
            seen[r] = odd ? make_float2(other, own) : make_float2(own, other);
            parts[r][0] = told[r].values[0], parts[r][1] = told[r].values[1];
        }
        few::merge(merged, parts, seen, sink);
        if constexpr (HG == 8) {  // neighbours have channels c, c + 8 and c + 1, c + 9
            const float other = __shfl_xor_sync(attention::ALL, odd ? merged[0] : merged[1], 1);
            (odd ? merged[0] : merged[1]) = other;
        }
        if (!there) return;
        bf16* to = a.out + (token * a.heads + head + mine) * attention::DH + channel;
        *reinterpret_cast<uint32_t*>(to) =
            attention::result(merged[0], merged[1], back, channel >= attention::DH - a.rope);
    }

    // Every unit of the group.
    static __device__ void all(const Attention& phase) {
        const int group = blockIdx.x / GROUP, groups = gridDim.x / GROUP, per_token = phase.a.groups;
        uint32_t turn = exchange::last_turn(phase.turns + group);
        for (int unit = group, token = 0;; unit += groups) {
            for (; unit >= per_token; unit -= per_token) ++token;
            if (token >= phase.rows) break;
            ++turn;
            run(phase.a, token, unit * HG, phase.words + (2 * group + turn % 2) * ROUND, turn);
            __syncthreads();
        }
        // All of the group have read the number: this block has heard from every warp.
        if (blockIdx.x % GROUP == 0 && threadIdx.x == 0) phase.turns[group] = turn;
    }
};

constexpr int ATTENTION_BYTES = sizeof(Unit<16>::Memory);  // of the work area, at most

// The arguments of dsv4_sparse_attention, then scratch and grid.
static cudaError_t describe_attention(Phase* phase, const void* q, const void* local, const void* local_rows,
                                      const void* pool, const void* pool_rows, const void* sink, const void* cis,
                                      const void* turn, void* out, int64_t rows, int64_t turn_stride,
                                      int64_t local_stride, int64_t pool_stride, int64_t cis_stride, int heads,
                                      int local_width, int pool_width, int local_packed, int pool_packed, int rope,
                                      int split, float scale, float eps, void* scratch, int grid) {
    const int groups = grid / GROUP;
    if (rows < 1 || rows > TOKENS || heads < 1 || !split) return cudaErrorInvalidValue;
    if (groups < 1 || grid > MAX_BLOCKS) return cudaErrorInvalidValue;
    Attention held = {};
    const cudaError_t error = attention::describe(
        &held.a, q, local, local_rows, pool, pool_rows, sink, cis, turn, out, turn_stride, local_stride, pool_stride,
        cis_stride, heads, local_width, pool_width, local_packed, pool_packed, rope, scale, eps);
    if (error) return error;
    if (!aligned16(scratch)) return cudaErrorMisalignedAddress;
    held.rows = static_cast<int>(rows);
    held.heads = rows * ((heads + 7) / 8) <= groups ? 8 : 16;
    held.a.groups = (heads + held.heads - 1) / held.heads;
    held.words = static_cast<exchange::Word*>(scratch);
    held.turns = reinterpret_cast<uint32_t*>(held.words + groups * 2 * ROUND);
    *phase = {};
    phase->kind = ATTENTION;
    memcpy(phase->payload, &held, sizeof held);
    return cudaSuccess;
}

static __device__ __forceinline__ void attention_phase(int turn) {
    const Attention& phase = payload<Attention>(turn);
    if (blockIdx.x / GROUP >= gridDim.x / GROUP) return;
    if (phase.heads == 8) Unit<8>::all(phase);
    else Unit<16>::all(phase);
}

}  // namespace dsv4::persistent
