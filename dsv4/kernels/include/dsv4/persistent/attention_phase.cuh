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

constexpr int TILES = 5, STAGE = TILES * attention::TILE;

// Entries and queries lie at the same places for eight heads and sixteen.
template <int HG>
struct AttentionWork {
    static constexpr int STAGE = persistent::STAGE, SCORE_ROW = STAGE + 4, PARTS = 32 / HG;
    alignas(16) uint8_t entries[STAGE * attention::ROW];
    alignas(16) uint8_t q[16 * attention::ROW];
    alignas(16) float scores[PARTS][HG][SCORE_ROW];
    alignas(8) float seen[16][2];
    float fade[16];
    int rows[(STAGE + 31) / 32 * 32], last[WARPS];  // -1 behind the stage
};

// What a warp brings of a unit's entries: of each tile of a stage the one of its own number. Bytes lie first where the
// entry itself will.
struct Entries {
    const attention::Arguments& a;
    AttentionWork<16>& s;
    const int token, rank, warp, lane;

    __device__ __forceinline__ Entries(const attention::Arguments& a, int token)
        : a(a), s(work<AttentionWork<16>>()), token(token), rank(blockIdx.x % GROUP), warp(threadIdx.x / 32),
          lane(threadIdx.x % 32) {}

    __device__ __forceinline__ int position_of(int slot) const {
        return (slot / attention::TILE * GROUP + rank) * attention::TILE + slot % attention::TILE;
    }
    __device__ __forceinline__ const attention::Source& source(int position) const {
        return position < a.local_positions ? a.local : a.pool;
    }
    __device__ __forceinline__ int positions() const { return a.local_positions + a.pool.width; }

    // The row number at a slot of stage 0, or one of a later stage; -1 for none.
    __device__ __forceinline__ int row_at(int slot) const {
        const int position = position_of(slot);
        const attention::Source& from = source(position);
        const int at = position - (position < a.local_positions ? 0 : a.local_positions);
        return at < from.width ? static_cast<int>(from.rows[token * from.row_stride + at]) : -1;
    }

    __device__ __forceinline__ void read_rows(int stage) {
        const int slot = lane * attention::TILE + warp;
        if (lane < TILES) s.rows[slot] = row_at(stage * STAGE + slot);
        else if (lane == TILES) s.rows[slot] = -1;
    }

    // The last slot behind stage 0 that holds an entry, among those that this thread looks at.
    __device__ __forceinline__ int scan() const {
        int last = 0;
#pragma unroll 1
        for (int i = STAGE + warp * 32 + lane; position_of(i) < positions(); i += THREADS)
            if (row_at(i) >= 0) last = i;
        return __reduce_max_sync(attention::ALL, last);
    }

    // Starts to copy; zeros where there is no entry: 0 x NaN must not reach a sum.
    __device__ __forceinline__ void fetch(int stage) {
        uint8_t* to = s.entries + warp * attention::ROW;
#pragma unroll 1
        for (int slot = warp; slot < STAGE; slot += attention::TILE, to += attention::TILE * attention::ROW) {
            const int position = position_of(stage * STAGE + slot), row = s.rows[slot];
            if (position - warp >= positions()) break;
            const attention::Source& from = source(position);
            if (row < 0) {
                uint4* zeros = reinterpret_cast<uint4*>(to) + lane;
                zeros[0] = zeros[32] = make_uint4(0, 0, 0, 0);
            } else if (from.packed) {
                const uint8_t* entry = from.data + static_cast<int64_t>(row) * kv::ENTRY_BYTES + lane * 8;
                copy_async8(to + lane * 8, entry);
                copy_async8(to + lane * 8 + 256, entry + 256);
                if (lane < (kv::ENTRY_BYTES - 512) / 8) copy_async8(to + lane * 8 + 512, entry + 512);
            } else {
                const uint8_t* entry = from.data + static_cast<int64_t>(row) * (attention::DH * 2) + lane * 16;
                copy_async16(to + lane * 16, entry);
                copy_async16(to + lane * 16 + attention::DH, entry + attention::DH);
            }
        }
    }

    // Packed bytes, which have come, to BF16.
    __device__ __forceinline__ void decode(int stage) {
        const bool codes = lane < (kv::PLAIN - 256) / 8;
        const int high = codes ? 256 + 8 * lane : kv::PLAIN + 16 * (lane - (kv::PLAIN - 256) / 8);
        const int rest = codes ? kv::SCALES : high + 8, shift = lane / 8 * 8;
        uint8_t* at = s.entries + warp * attention::ROW;
#pragma unroll 1
        for (int slot = warp; slot < STAGE; slot += attention::TILE, at += attention::TILE * attention::ROW) {
            if (s.rows[slot] < 0 || !source(position_of(stage * STAGE + slot)).packed) continue;
            const uint2 x = *reinterpret_cast<const uint2*>(at + 8 * lane);
            const uint2 y = *reinterpret_cast<const uint2*>(at + high);
            const uint2 z = *reinterpret_cast<const uint2*>(at + rest);
            const uint32_t scales = *reinterpret_cast<const uint32_t*>(at + kv::SCALES);
            __syncwarp();  // the bytes have been read
            uint4* to = reinterpret_cast<uint4*>(at) + lane;
            to[0] = kv::e4m3x8_to_bf16(x, scales >> shift & 255);
            to[32] = codes ? kv::e4m3x8_to_bf16(y, z.y >> shift & 255) : make_uint4(y.x, y.y, z.x, z.y);
        }
    }
};

// A unit of work; words: of this turn.
template <int HG>
struct Unit {
    using Work = AttentionWork<HG>;
    static constexpr int MINE = HG / GROUP;
    using Block = few::Block<HG, TILES, Work>;

    // The warp's query, as it came, is on its way.
    static __device__ __forceinline__ void fetch_query(const Entries& e, int head) {
        if (e.warp >= HG || head + e.warp >= e.a.heads) return;
        const uint8_t* from = e.a.q + (static_cast<int64_t>(e.token) * e.a.heads + head + e.warp) * (attention::DH * 2);
        uint8_t* to = e.s.q + e.warp * attention::ROW + e.lane * 16;
        copy_async16(to, from + e.lane * 16);
        copy_async16(to + attention::DH, from + e.lane * 16 + attention::DH);
    }

    // All copies but the last group's have come.
    static __device__ __forceinline__ void treat_query(const Entries& e, int head, const float2 (&turns)[4]) {
        if (e.warp >= HG) return;
        uint8_t* row = e.s.q + e.warp * attention::ROW;
        attention::Query q = {};
        if (head + e.warp < e.a.heads)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 x = *reinterpret_cast<const uint4*>(row + half * attention::DH + e.lane * 16);
                q[half][0] = x.x, q[half][1] = x.y, q[half][2] = x.z, q[half][3] = x.w;
            }
        if (e.a.turn != nullptr) attention::norm_rope(q, turns, e.a, e.lane);
        attention::put_query(row, q, e.lane);
    }

    // A block's share; the rows of stage 0 may have been read. Nothing is read of a stage while another is worked on.
    static __device__ __forceinline__ void add_up(Block& block, Entries& e, int head, bool known) {
        Work& s = block.s;
        float2 turns[4] = {};
        fetch_query(e, head);
        copies_commit();
        if (e.a.turn != nullptr) attention::load_turns(turns, e.a, e.token, e.lane);
        if (!known) e.read_rows(0);
        if (threadIdx.x < HG) s.seen[threadIdx.x][0] = attention::LOWEST, s.seen[threadIdx.x][1] = 0.0f;
        for (auto& rows : block.sums)
            for (auto& sum : rows) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
        const bool longer = e.positions() > GROUP * STAGE;
        int stages = 1;
#pragma unroll 1
        for (int stage = 0; stage < stages; ++stage) {
            if (stage > 0) e.read_rows(stage);
            __syncwarp();
            e.fetch(stage);
            copies_commit();
            if (stage == 0) {
                if (longer) {
                    const int last = e.scan();
                    if (e.lane == 0) s.last[e.warp] = last;
                }
                copies_wait_but<1>();
                treat_query(e, head, turns);
            }
            copies_wait_but<0>();
            __syncwarp();
            e.decode(stage);
            __syncthreads();
            if (stage == 0 && longer)
                stages = __reduce_max_sync(attention::ALL, s.last[e.lane % WARPS]) / STAGE + 1;
#pragma unroll
            for (int c = 0; c < Block::WORDS; ++c)
                block.there[c] = __ballot_sync(attention::ALL, s.rows[c * 32 + e.lane] >= 0);
            if (const int used = block.used_tiles()) {
                block.score(used);
                __syncthreads();
                block.softmax(used);
                __syncthreads();
                block.accumulate(used);
            }
            if (stage + 1 < stages) __syncthreads();  // entries are no longer read
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

    // What the blocks have of a pair of channels of a head, as few::merge adds it up; a warp has one head. from: the
    // pair's words, all: the head's.
    static __device__ __forceinline__ void hear(float (&merged)[2], const exchange::Word* from, const exchange::Word* all,
                                                uint32_t turn, float sink) {
        const int lane = threadIdx.x % 32;  // 2 r has the largest logit of block r, 2 r + 1 the sum
        exchange::Word told[GROUP], numbers;
        bool here;
        do {
#pragma unroll
            for (int r = 0; r < GROUP; ++r) told[r] = exchange::look(from + r * PAIRS);
            numbers = exchange::look(all + lane / 2 % GROUP * PAIRS + lane % 2);
            here = numbers.turn == turn;
#pragma unroll
            for (int r = 0; r < GROUP; ++r) here &= told[r].turn == turn;
        } while (!here);
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

    static __device__ __forceinline__ void run(const attention::Arguments& a, int token, int head, bool known,
                                               exchange::Word* words, uint32_t turn) {
        Entries entries(a, token);
        Block block(a, work<Work>(), token, entries.rank);
        add_up(block, entries, head, known);
        const int pair = threadIdx.x % PAIRS, mine = block.rank * MINE + threadIdx.x / PAIRS, odd = pair % 2;
        const int channel = HG == 8 ? pair / 8 * 16 + odd * 8 + pair % 8 - odd : 2 * pair;  // that is written
        const bool reads = threadIdx.x < MINE * PAIRS, there = reads && head + mine < a.heads;
        const float2 back = attention::turn_back(a, token, channel);
        const float sink = there ? a.sink[head + mine] * few::LOG2E : 0.0f;
        tell(block, words, turn);
        if (!reads) return;
        float merged[2];
        const exchange::Word* all = words + mine * GROUP * PAIRS;
        hear(merged, all + pair, all, turn, sink);
        if constexpr (HG == 8) {  // neighbours have channels c, c + 8 and c + 1, c + 9
            const float other = __shfl_xor_sync(attention::ALL, odd ? merged[0] : merged[1], 1);
            (odd ? merged[0] : merged[1]) = other;
        }
        if (!there) return;
        bf16* to = a.out + (static_cast<int64_t>(token) * a.heads + head + mine) * attention::DH + channel;
        *reinterpret_cast<uint32_t*>(to) =
            attention::result(merged[0], merged[1], back, channel >= attention::DH - a.rope);
    }

    // Every unit of the group.
    static __device__ __forceinline__ void all(const Attention& phase, bool known) {
        const int group = blockIdx.x / GROUP, groups = gridDim.x / GROUP, per_token = phase.a.groups;
        uint32_t turn = exchange::last_turn(phase.turns + group);
#pragma unroll 1
        for (int unit = group, token = 0;; unit += groups, known = false) {
            for (; unit >= per_token; unit -= per_token) ++token;
            if (token >= phase.rows) break;
            ++turn;
            run(phase.a, token, unit * HG, known, phase.words + (2 * group + turn % 2) * ROUND, turn);
            __syncthreads();
        }
        // All of the group have read the number: this block has heard from every warp.
        if (blockIdx.x % GROUP == 0 && threadIdx.x == 0) phase.turns[group] = turn;
    }
};

constexpr int ATTENTION_BYTES = sizeof(AttentionWork<16>);  // of the work area, at most

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

// Whether the phase in front, of kind `before`, writes no row numbers.
static __device__ __forceinline__ bool rows_known(int before) { return before == LINEAR || before == INPUTS; }

// Every thread calls, after come() behind the phase in front.
static __device__ __forceinline__ void attention_ahead(int turn, int before) {
    const Attention& phase = payload<Attention>(turn);
    int unit = blockIdx.x / GROUP, token = 0;
    if (!rows_known(before) || unit >= static_cast<int>(gridDim.x) / GROUP) return;
    for (; unit >= phase.a.groups; unit -= phase.a.groups) ++token;
    if (token < phase.rows) Entries(phase.a, token).read_rows(0);
}

static __device__ __forceinline__ void attention_phase(int turn, int before) {
    const Attention& phase = payload<Attention>(turn);
    if (blockIdx.x / GROUP >= gridDim.x / GROUP) return;
    if (phase.heads == 8) Unit<8>::all(phase, rows_known(before));
    else Unit<16>::all(phase, rows_known(before));
}

}  // namespace dsv4::persistent
