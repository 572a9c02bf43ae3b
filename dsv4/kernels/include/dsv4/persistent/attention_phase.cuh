// sparse_attention of a decode step. Some heads of a token go to a group of eight blocks, as in attention_cluster.cuh
// to a cluster: eight heads, or sixteen where there would be more of them than groups. The blocks tell each other their
// results through the L2 cache in one trip (exchange.cuh), and each adds up those of an eighth of the heads.
#pragma once
#include <cstring>
#include <type_traits>

#include <dsv4/exchange.cuh>
#include <dsv4/persistent/attention_entries.cuh>
#include <dsv4/persistent/meeting.cuh>

namespace dsv4::persistent {

constexpr int PAIRS = attention::DH / 2;  // words of a head and a block
constexpr int64_t ROUND = 16 * GROUP * PAIRS;  // words of one turn of a group

struct Attention {
    attention::Arguments a;
    int rows, heads;        // heads: of a unit
    exchange::Word* words;  // [groups, 2, ROUND]
    uint32_t* turns;        // [groups, 8] the last turn, as each block counts it
    exchange::Word* chunks; // of long rows
};

// Bytes of scratch: zeros before its first use, then left alone. Phases of all programs of such a grid may share it.
constexpr int64_t attention_scratch(int grid) {
    return grid / GROUP * (2 * ROUND * static_cast<int64_t>(sizeof(exchange::Word)) + GROUP * 4);
}

// The same of a program with long rows, for their chunks.
constexpr int64_t LONG_GROUP_BYTES = 2 * few::CHUNKS * ROUND * static_cast<int64_t>(sizeof(exchange::Word));
static_assert(LONG_GROUP_BYTES == 4 << 20, "LONG_GROUP_BYTES in dsv4/kernels/decode_layers/describe.py");
constexpr uint32_t LONG_TURN = 1u << 31;  // of numbers of long rows' turns

constexpr int SEAM_GROUPS = 8;  // have a seam's code in their caches; others come first

// Of a block's group, which exists. Others follow by the number of groups.
static __device__ __forceinline__ int first_unit() {
    const int group = blockIdx.x / GROUP, groups = gridDim.x / GROUP, turned = group - SEAM_GROUPS;
    return groups <= SEAM_GROUPS ? group : turned < 0 ? turned + groups : turned;
}

// Groups that share a unit of long rows, each with some of its chunks: those that come first have the first chunk.
static __device__ __forceinline__ int sharers(int units) {
    const int groups = gridDim.x / GROUP;
    return groups >= 4 * units ? 4 : groups >= 2 * units ? 2 : 1;
}

// What a group does of a unit: all, which is one stage; or of long rows chunks `first`, `first` + `step`, .., all of which
// tell each other in `words`. scanned: how long rows are has been looked up.
struct Whole {};
struct Chunks {
    exchange::Word* words;
    int first, step;
    bool scanned;
};

// A unit of work.
template <int HG>
struct Unit {
    using Work = AttentionWork<HG>;
    static constexpr int MINE = HG / GROUP;
    using Block = few::Block<HG, TILES, Work>;

    // What a stage adds to a block's share; with the first one, queries are brought where they have not been begun. FIRST:
    // it is the first and only one, and the places of its row numbers have been found; nothing has been cleared.
    template <bool FIRST>
    static __device__ __forceinline__ void add_stage(Block& all, int head, int stage, Begun begun, bool asks) {
        Work& s = all.s;
        const Entries e(all.a, all.token);
        Block block(all.a, s, all.token, e.rank);
        attention::Query q = {};
        float2 turns[4] = {};
        int rows[Entries::WORDS];
        few::Bytes bytes[TILES];
        e.template read<FIRST>(rows, stage, begun.rows);
        if (asks) e.load_query(q, turns, head, HG);
        block.look(rows);
        const int used = block.used_tiles();
        const unsigned bring = (1u << used) - 1 >> begun.tiles << begun.tiles;
        const Entries::Found found = e.find(rows, stage, begun.tiles, used);
        // All that lanes tell each other comes before the loads or behind them: the compiler waits there for loads.
        const uint8_t* from[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) from[tile] = found.of(tile), bytes[tile] = {};
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            if (found.there & 1u << tile) bytes[tile] = few::Bytes::of(from[tile], e.lane);
        if (asks) e.treat_query(q, turns, HG);
        uint32_t scales[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) scales[tile] = bytes[tile].first_scales();
#pragma unroll 1
        for (int tile = 0; tile < TILES; ++tile) {
            if (bring & found.packed & 1u << tile) e.put(tile, bytes[0], scales[0]);
#pragma unroll
            for (int k = 0; k + 1 < TILES; ++k) bytes[k] = bytes[k + 1], scales[k] = scales[k + 1];
        }
        e.copy_plain(found, bring);
        __syncthreads();
        if (used) {
            block.score(used);
            __syncthreads();
            block.template softmax<FIRST>(used);
            __syncthreads();
            if constexpr (!FIRST) memcpy(block.sums, all.sums, sizeof all.sums);
            block.template accumulate<FIRST>(used);
            memcpy(all.sums, block.sums, sizeof all.sums);
        } else if constexpr (FIRST) {
            all.clear();
            __syncthreads();
        }
    }

    // A word has two channels of a head, and either number of what the block has seen of it: the largest logit in an
    // even word, the sum in an odd one.
    static __device__ __forceinline__ void tell(const Block& block, exchange::Word* words, uint32_t turn) {
        const int g = block.lane / 4, t = block.lane % 4;
        const int head = HG == 8 ? 2 * t : g, step = HG == 8 ? 1 : 8;  // this lane's, and how far off the other is
        const int pair = block.warp * 16 + (HG == 8 ? g : t);
        exchange::Word* to = words + (head * GROUP + block.rank) * PAIRS + pair;
        const float first = block.s.seen[head][pair % 2], second = block.s.seen[head + step][pair % 2];
        const auto put = [&](int at, float x, float y, float seen) {
            const float values[exchange::PER_WORD] = {x, y, seen};
            exchange::tell(to + at, values, turn);
        };
#pragma unroll
        for (int n = 0; n < (HG == 8 ? 2 : 4); ++n) {
            const float(&sums)[4] = block.sums[0][n];
            constexpr bool EIGHT = HG == 8;  // channels g and g + 8 of sixteen
            put(n * (EIGHT ? 8 : 4), sums[0], EIGHT ? sums[2] : sums[1], first);
            put(n * (EIGHT ? 8 : 4) + step * GROUP * PAIRS, EIGHT ? sums[1] : sums[2], sums[3], second);
        }
    }

    // What the blocks have of a pair of channels of a head, added up as in few::Cluster; a warp has one head. from: the
    // pair's words, all: the head's.
    static __device__ __forceinline__ void hear(float (&merged)[2], const exchange::Word* from, const exchange::Word* all,
                                                uint32_t turn, float sink) {
        const int lane = threadIdx.x % 32;  // 2 r has the largest logit of block r, 2 r + 1 the sum
        const exchange::Word* number_at = all + lane / 2 % GROUP * PAIRS + lane % 2;
        exchange::Word told[GROUP], numbers = exchange::look(number_at);
#pragma unroll
        for (int r = 0; r < GROUP; ++r) told[r] = exchange::look(from + r * PAIRS);
        for (bool here = false; !here;) {  // only those that are late are looked at again
            here = numbers.turn == turn;
            if (!here) numbers = exchange::look(number_at);
#pragma unroll
            for (int r = 0; r < GROUP; ++r)
                if (told[r].turn != turn) told[r] = exchange::look(from + r * PAIRS), here = false;
        }
        __syncwarp();
        const float number = numbers.values[2];
        const float top = few::warp_max(lane % 2 ? attention::LOWEST : number);
        const float weight = exp2f((lane < 2 * GROUP ? number : sink) - top);  // of lanes 2 r; of the sink behind them
        float total = 0.0f, sum[2] = {};
#pragma unroll
        for (int r = 0; r < GROUP; ++r) {
            const float w = __shfl_sync(attention::ALL, weight, 2 * r);
            total = fmaf(__shfl_sync(attention::ALL, number, 2 * r + 1), w, total);
#pragma unroll
            for (int k = 0; k < 2; ++k) sum[k] = fmaf(told[r].values[k], w, sum[k]);
        }
        total += __shfl_sync(attention::ALL, weight, 2 * GROUP);
        merged[0] = sum[0] / total, merged[1] = sum[1] / total;
    }

    static __device__ __forceinline__ exchange::Word* words_of(exchange::Word* chunks, int chunk, int head, int rank) {
        return chunks + ((chunk * HG + head) * GROUP + rank) * PAIRS;
    }

    // Of a chunk in which the block has nothing.
    static __device__ __forceinline__ void tell_nothing(exchange::Word* words, uint32_t turn) {
        if (threadIdx.x >= 2 * HG) return;
        const int odd = threadIdx.x % 2;
        const float values[exchange::PER_WORD] = {0.0f, 0.0f, odd ? -1.0f : attention::LOWEST};
        exchange::tell(words_of(words, 0, threadIdx.x / 2, blockIdx.x % GROUP) + odd, values, turn);
    }

    static __device__ __forceinline__ void tell_chunks(Block& block, int head, Begun begun, uint32_t turn, Chunks share) {
        const Entries e(block.a, block.token);
        if (!share.scanned) e.scan();
        __syncthreads();
        const int stages = __reduce_max_sync(attention::ALL, e.s.last[e.lane % WARPS]) / STAGE + 1;
        const int size = few::chunk_of(stages);
        bool asks = !begun.queries;
#pragma unroll 1
        for (int chunk = share.first; chunk < few::CHUNKS; chunk += share.step) {
            exchange::Word* to = words_of(share.words, chunk, 0, 0);
            const int stop = min((chunk + 1) * size, stages);
            int stage = chunk * size;
            if (stage >= stop) {
                tell_nothing(to, turn);
                continue;
            }
            block.clear();
#pragma unroll 1
            for (; stage < stop; ++stage) {
                add_stage<false>(block, head, stage, begun, asks);
                begun = {}, asks = false;
                if (stage + 1 < stop) __syncthreads();  // entries are no longer read
            }
            tell(block, to, turn);
            __syncthreads();  // nor is what was seen
        }
    }

    // What the blocks have of a pair of channels of a head, as sparse_attention_merge adds it up; a warp has one head.
    static __device__ __forceinline__ void hear_chunks(float (&merged)[2], exchange::Word* words, int head, int pair,
                                                       uint32_t turn, float sink) {
        static_assert(few::CHUNKS * GROUP == 32, "a lane has what was seen of one part");
        const int lane = threadIdx.x % 32;
        const exchange::Word* at = words_of(words, lane / GROUP, head, lane % GROUP);
        exchange::Word most = exchange::look(at), sums = exchange::look(at + 1);
        while (most.turn != turn) most = exchange::look(at);
        while (sums.turn != turn) sums = exchange::look(at + 1);
        __syncwarp();
        const float seen = sums.values[2];
        const unsigned there = __ballot_sync(attention::ALL, !(seen < 0.0f));
        const float top = few::warp_max(most.values[2]), weight = exp2f(most.values[2] - top);
        float total = 0.0f, sum[2] = {};
#pragma unroll 1
        for (int chunk = 0; chunk < few::CHUNKS && there >> chunk * GROUP != 0; ++chunk) {
            const unsigned here = there >> chunk * GROUP;
            const exchange::Word* from = words_of(words, chunk, head, 0) + pair;
            exchange::Word told[GROUP];
#pragma unroll
            for (int r = 0; r < GROUP; ++r) told[r] = exchange::look(from + r * PAIRS);
#pragma unroll
            for (int r = 0; r < GROUP; ++r)
                while (here >> r & 1 && told[r].turn != turn) told[r] = exchange::look(from + r * PAIRS);
            __syncwarp();
#pragma unroll
            for (int r = 0; r < GROUP; ++r) {
                const float w = __shfl_sync(attention::ALL, weight, chunk * GROUP + r);
                const float y = __shfl_sync(attention::ALL, seen, chunk * GROUP + r);
                if (!(here >> r & 1)) continue;
                total = fmaf(y, w, total);
#pragma unroll
                for (int k = 0; k < 2; ++k) sum[k] = fmaf(told[r].values[k], w, sum[k]);
            }
        }
        total += exp2f(sink - top);
        merged[0] = sum[0] / total, merged[1] = sum[1] / total;
    }

    // turn: this one's number. What is used in the end is asked for when the block has told its share: it comes meanwhile.
    // share: Whole, or the Chunks of this group.
    template <typename Share>
    static __device__ __forceinline__ void run(const Attention& phase, int token, int head, Begun begun, uint32_t turn,
                                               Share share) {
        const attention::Arguments& a = phase.a;
        Block block(a, work<Work>(), token, blockIdx.x % GROUP);
        const int pair = threadIdx.x % PAIRS, mine = block.rank * MINE + threadIdx.x / PAIRS, odd = pair % 2;
        const int channel = HG == 8 ? pair / 8 * 16 + odd * 8 + pair % 8 - odd : 2 * pair;  // that is written
        const bool reads = threadIdx.x < MINE * PAIRS, there = reads && head + mine < a.heads;
        float2 back;
        float sink, merged[2];
        const auto ask = [&] {
            back = attention::turn_back(a, token, channel);
            sink = a.sink[there ? head + mine : 0];
        };
        if constexpr (std::is_same_v<Share, Chunks>) {
            tell_chunks(block, head, begun, turn, share);
            if (share.first > 0 || !reads) return;
            ask();
            hear_chunks(merged, share.words, mine, pair, turn, __fmul_rn(sink, few::LOG2E));
        } else {
            add_stage<true>(block, head, 0, begun, !begun.queries);
            exchange::Word* words = phase.words + (2 * (blockIdx.x / GROUP) + turn % 2) * ROUND;
            tell(block, words, turn);
            if (!reads) return;
            ask();
            const exchange::Word* all = words + mine * GROUP * PAIRS;
            hear(merged, all + pair, all, turn, __fmul_rn(sink, few::LOG2E));
        }
        if constexpr (HG == 8) {  // neighbours have channels c, c + 8 and c + 1, c + 9
            const float other = __shfl_xor_sync(attention::ALL, odd ? merged[0] : merged[1], 1);
            (odd ? merged[0] : merged[1]) = other;
        }
        if (!there) return;
        bf16* to = a.out + (static_cast<int64_t>(token) * a.heads + head + mine) * attention::DH + channel;
        *reinterpret_cast<uint32_t*>(to) =
            attention::result(merged[0], merged[1], back, channel >= attention::DH - a.rope);
    }

    // Every unit of the group, the first of which is known.
    static __device__ __forceinline__ void all(const Attention& phase, Begun begun) {
        const int groups = gridDim.x / GROUP, per_token = phase.a.groups;
        auto [unit, token, turn] = work<Work>().first;
        if (token >= phase.rows) return;
#pragma unroll 1
        while (true) {
            run(phase, token, unit * HG, begun, ++turn, Whole{});
            for (unit += groups; unit >= per_token; unit -= per_token) ++token;
            if (token >= phase.rows) break;
            begun = {};
            Entries(phase.a, token).find_places();
            __syncthreads();
        }
        if (threadIdx.x == 0) phase.turns[blockIdx.x] = turn;
    }

    // The same of long rows. How often blocks have met tells turns apart.
    static __device__ __forceinline__ void all_long(const Attention& phase, Begun begun) {
        const int groups = gridDim.x / GROUP, units = phase.rows * phase.a.groups, step = sharers(units);
        bool scanned = begun.rows;
        uint32_t turn = LONG_TURN | position().all;
#pragma unroll 1
        for (int item = first_unit(); item < units * step; item += groups) {
            const int unit = item % units, first = item / units, token = unit / phase.a.groups;
            const int place = step > 1 ? unit : 2 * (blockIdx.x / GROUP) + turn % 2;
            if (first > 0) begun = {};
            run(phase, token, (unit - token * phase.a.groups) * HG, begun, turn,
                Chunks{words_of(phase.chunks, place * few::CHUNKS, 0, 0), first, step, scanned});
            __syncthreads();
            ++turn, begun = {}, scanned = false;
        }
    }
};

constexpr int ATTENTION_BYTES = sizeof(AttentionWork<16>);  // of the work area, at most

// The arguments of dsv4_sparse_attention, then scratch, that of long rows and grid.
static cudaError_t describe_attention(Phase* phase, const void* q, const void* local, const void* local_rows,
                                      const void* pool, const void* pool_rows, const void* sink, const void* cis,
                                      const void* turn, void* out, int64_t rows, int64_t turn_stride,
                                      int64_t local_stride, int64_t pool_stride, int64_t cis_stride, int heads,
                                      int local_width, int pool_width, int local_packed, int pool_packed, int rope,
                                      int split, float scale, float eps, void* scratch, void* chunks, int grid) {
    const int groups = grid / GROUP;
    if (rows < 1 || rows > TOKENS || heads < 1 || !split) return cudaErrorInvalidValue;
    if (groups < 1 || grid > MAX_BLOCKS) return cudaErrorInvalidValue;
    Attention held = {};
    const cudaError_t error = attention::describe(
        &held.a, q, local, local_rows, pool, pool_rows, sink, cis, turn, out, turn_stride, local_stride, pool_stride,
        cis_stride, heads, local_width, pool_width, local_packed, pool_packed, rope, scale, eps);
    if (error) return error;
    if (!aligned16(scratch) || !aligned16(chunks)) return cudaErrorMisalignedAddress;
    held.rows = static_cast<int>(rows);
    held.heads = rows * ((heads + 7) / 8) <= groups ? 8 : 16;
    held.a.groups = (heads + held.heads - 1) / held.heads;
    held.words = static_cast<exchange::Word*>(scratch);
    held.turns = reinterpret_cast<uint32_t*>(held.words + groups * 2 * ROUND);
    held.chunks = static_cast<exchange::Word*>(chunks);
    *phase = {};
    phase->kind = ATTENTION;
    memcpy(phase->payload, &held, sizeof held);
    phase->joined = longer(held.a) || (rows == 1 && held.heads != 8) ? RARE_PHASE : 0;
    return cudaSuccess;
}

// What can be done before the phases in front, of kinds `before`, have ended: INDEX writes the pool's row numbers, LINEAR
// the queries. Entries are all there behind INDEX, since INPUTS was met in front of it.
template <bool ONE, bool RARE>
static __device__ __forceinline__ Begun begun_behind(int before, const attention::Arguments& a) {
    const bool multiplied = among(before, LINEAR);
    const int window = Entries::window(a);
    if (among(before, INDEX)) return {false, window, (!ONE || RARE) && !multiplied && window > 0};
    return {multiplied || among(before, INPUTS), 0, false};
}

// Every thread calls, after come() behind the phases in front.
template <bool ONE, bool RARE>
static __device__ __forceinline__ void attention_ahead(int turn, int before) {
    const Attention& phase = payload<Attention>(turn);
    const attention::Arguments& a = phase.a;
    if (blockIdx.x / GROUP >= gridDim.x / GROUP) return;
    int unit = first_unit(), token = 0, sharer = 0;
    if (const int units = phase.rows * a.groups; RARE && longer(a)) {
        if (unit >= units * sharers(units)) return;
        sharer = unit / units, unit %= units;
    }
    for (; unit >= a.groups; unit -= a.groups) ++token;
    if (threadIdx.x == 0) {
        work<AttentionWork<16>>().first = {unit, token, exchange::last_turn(phase.turns + blockIdx.x)};
    }
    if (token >= phase.rows) return;
    if (threadIdx.x == 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(a.sink + unit * phase.heads));
    const Entries e(a, token);
    const Begun begun = begun_behind<ONE, RARE>(before, a);
    if (!begun.rows) e.find_places();
    if (sharer == 0 && (begun.rows || begun.tiles > 0)) e.begin(begun, unit * phase.heads, begun.queries ? phase.heads : 0);
    if (RARE && begun.rows && longer(a)) e.scan();
}

template <bool ONE, bool RARE>
static __device__ __forceinline__ void attention_phase(int turn, int before) {
    const Attention& phase = payload<Attention>(turn);
    if (blockIdx.x / GROUP >= gridDim.x / GROUP) return;
    const Begun begun = begun_behind<ONE, RARE>(before, phase.a);
    if (RARE && longer(phase.a)) {
        if (phase.heads == 8) Unit<8>::all_long(phase, begun);
        else Unit<16>::all_long(phase, begun);
    } else {
        if (ONE && !RARE || phase.heads == 8) Unit<8>::all(phase, begun);
        else Unit<16>::all(phase, begun);
    }
}

}  // namespace dsv4::persistent
