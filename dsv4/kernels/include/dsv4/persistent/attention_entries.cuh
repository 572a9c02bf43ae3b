// Entries and queries of attention in one launch: where they lie in the work area, and how a warp brings its own.
#pragma once
#include <dsv4/attention_few.cuh>
#include <dsv4/persistent/memory.cuh>

namespace dsv4::persistent {

namespace few = attention::few;
static_assert(few::THREADS == THREADS && few::SPLITS == GROUP, "one way to share the work");

constexpr int TILES = 5, STAGE = TILES * attention::TILE;

// What a block begins with, by the phase's turn: a unit, and the number of its group's last turn, as it counts them.
struct First {
    int unit, token;  // of the token; those of no unit where there is none
    uint32_t turn;
};

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
    const int64_t* places[(STAGE + 31) / 32 * 32];  // of the row numbers of stage 0; of `none` where there is none
    int64_t none;                                   // -1
    First first;
};

// What is there of a unit's stage 0 before the phase begins: all row numbers, so many tiles, and the queries.
struct Begun {
    bool rows;
    int tiles;
    bool queries;
};

// What only longer lists need stands out of the others' way.
__host__ __device__ __forceinline__ bool longer(const attention::Arguments& a) { return __builtin_expect(few::longer<TILES>(a), false); }

// What a warp brings of a unit's entries: of each tile of a stage the one of its own number.
struct Entries {
    static constexpr int WORDS = (STAGE + 31) / 32;

    const attention::Arguments& a;
    AttentionWork<16>& s;
    const int token, rank, warp, lane;

    // Lane j has where the entry of tile j is, or something else that can be read. Bits: of the tiles with an entry, and of
    // those whose entries are packed.
    struct Found {
        const uint8_t* entry;
        unsigned there, packed;

        __device__ __forceinline__ const uint8_t* of(int tile) const {
            const auto at = reinterpret_cast<unsigned long long>(entry);
            return reinterpret_cast<const uint8_t*>(__shfl_sync(attention::ALL, at, tile));
        }
    };

    __device__ __forceinline__ Entries(const attention::Arguments& a, int token)
        : a(a), s(work<AttentionWork<16>>()), token(token), rank(blockIdx.x % GROUP), warp(threadIdx.x / 32),
          lane(threadIdx.x % 32) {}

    __device__ __forceinline__ int position_of(int slot) const {
        return (slot / attention::TILE * GROUP + rank) * attention::TILE + slot % attention::TILE;
    }

    // Tiles of stage 0 that are the window's.
    static __device__ __forceinline__ int window(const attention::Arguments& a) {
        return min(a.local_positions / (GROUP * attention::TILE), TILES);
    }

    // Finds those of stage 0; there for all after a barrier.
    __device__ __forceinline__ void find_places() const {
        const int slot = threadIdx.x;
        if (slot == 0) s.none = -1;
        if (slot >= WORDS * 32) return;
        const int64_t* place = slot < STAGE ? a.place_of(token, position_of(slot)) : nullptr;
        s.places[slot] = place != nullptr ? place : &s.none;
    }

    // All row numbers of a stage: each warp reads them itself, so that none waits for another before the products. known:
    // they have been read. FOUND: the stage is 0, and where they are has been found.
    template <bool FOUND>
    __device__ __forceinline__ void read(int (&rows)[WORDS], int stage, bool known) const {
#pragma unroll
        for (int c = 0; c < WORDS; ++c) {
            const int slot = c * 32 + lane;
            if (known) rows[c] = s.rows[slot];
            else if (FOUND) rows[c] = static_cast<int>(*s.places[slot]);
            else rows[c] = slot < STAGE ? a.row_at(token, position_of(stage * STAGE + slot)) : -1;
        }
    }

    // The warp's entries of a stage from tile `first` up to `end`, less those whose row numbers are -1 in `rows`.
    __device__ __forceinline__ Found find(const int (&rows)[WORDS], int stage, int first, int end) const {
        int row = -1;
#pragma unroll
        for (int c = 0; c < WORDS; ++c) {
            const int of_lane = __shfl_sync(attention::ALL, rows[c], lane % 2 * attention::TILE + warp);
            if (lane / 2 == c) row = of_lane;
        }
        if (lane < first || lane >= end) row = -1;
        const bool local = position_of((stage * TILES + lane) * attention::TILE) < a.local_positions;
        const attention::Source& from = local ? a.local : a.pool;
        const bool packed = from.packed;
        Found found;
        const int size = packed ? kv::ENTRY_BYTES : attention::DH * 2;
        found.entry = row < 0 ? a.q : from.data + static_cast<int64_t>(row) * size;
        found.there = __ballot_sync(attention::ALL, row >= 0);
        found.packed = __ballot_sync(attention::ALL, packed);
        return found;
    }

    // The last slot behind stage 0 that holds an entry, among those that this warp looks at.
    __device__ __forceinline__ void scan() const {
        int last = 0;
#pragma unroll 1
        for (int i = STAGE + warp * 32 + lane, position; (position = position_of(i)) < a.positions(); i += THREADS)
            if (a.row_at(token, position) >= 0) last = i;
        last = __reduce_max_sync(attention::ALL, last);
        if (lane == 0) s.last[warp] = last;
    }

    // Bytes that are zeros are an entry of zeros, as is wanted where there is none: 0 x NaN must not reach a sum.
    __device__ __forceinline__ void put(int tile, const few::Bytes& bytes, uint32_t first_scales) const {
        bytes.put(s.entries + (tile * attention::TILE + warp) * attention::ROW, first_scales, lane);
    }

    // Those of tiles that are BF16 already.
    __device__ __forceinline__ void copy_plain(const Found& found, unsigned tiles) const {
#pragma unroll 1
        for (unsigned left = tiles & ~found.packed; left != 0; left &= left - 1) {
            const int tile = __ffs(left) - 1;
            const uint4* from = reinterpret_cast<const uint4*>(found.of(tile)) + lane;
            uint4* to = reinterpret_cast<uint4*>(s.entries + (tile * attention::TILE + warp) * attention::ROW) + lane;
            const bool there = found.there >> tile & 1;
            to[0] = there ? from[0] : make_uint4(0, 0, 0, 0);
            to[32] = there ? from[32] : make_uint4(0, 0, 0, 0);
        }
    }

    // Stage 0 as far as it can be known ahead. Row numbers are kept and the L2 cache is asked for the entries; or tiles are
    // brought, one after the other, and queries: `heads` of them from `head` on.
    __device__ __forceinline__ void begin(const Begun& begun, int head, int heads) const {
        attention::Query q = {};
        float2 turns[4] = {};
        int rows[WORDS];
        read<false>(rows, 0, false);
        load_query(q, turns, head, heads);
        const Found found = find(rows, 0, 0, begun.rows ? TILES : begun.tiles);
        if (begun.rows) {
#pragma unroll
            for (int c = 0; c < WORDS; ++c)
                if (warp == c) s.rows[c * 32 + lane] = rows[c];
        }
        treat_query(q, turns, heads);
        const unsigned all = (1u << begun.tiles) - 1;
#pragma unroll 1
        for (unsigned left = begun.rows ? found.there : all & found.packed; left != 0; left &= left - 1) {
            const int tile = __ffs(left) - 1;
            const uint8_t* from = found.of(tile);
            if (begun.rows) {
                if (lane * 32 < (found.packed >> tile & 1 ? kv::ENTRY_BYTES : attention::DH * 2))
                    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + lane * 32));
                continue;
            }
            few::Bytes bytes = few::Bytes::of(from, lane);
            if (!(found.there >> tile & 1)) bytes = {};
            put(tile, bytes, bytes.first_scales());
        }
        copy_plain(found, all);
    }

    // The warp's query, as it came, and its rotations.
    __device__ __forceinline__ void load_query(attention::Query& q, float2 (&turns)[4], int head, int heads) const {
        if (warp >= heads) return;
        attention::load_query(q, a, token, head + warp, lane);
        if (a.turn != nullptr) attention::load_turns(turns, a, token, lane);
    }

    __device__ __forceinline__ void treat_query(attention::Query& q, const float2 (&turns)[4], int heads) const {
        if (warp >= heads) return;
        if (a.turn != nullptr) attention::norm_rope(q, turns, a, lane);
        attention::put_query(s.q + warp * attention::ROW, q, lane);
    }
};

}  // namespace dsv4::persistent
