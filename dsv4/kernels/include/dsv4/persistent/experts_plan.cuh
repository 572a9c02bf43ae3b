// What ROUTE leaves for EXPERTS, what EXPERTS is given, how it lays its work area out, and the order in which a warp
// takes pieces of tiles and asks for their weights.
#pragma once
#include <dsv4/moe_few_product.cuh>
#include <dsv4/peers.cuh>
#include <dsv4/persistent/stream.cuh>

namespace dsv4::persistent {

static_assert(WARPS == 16 && WARPS == moe::FEW_WARPS && TOKENS == moe::TOKENS && CHUNK == moe::CHUNK, "a phase is like the op's kernel");

// The pairs (token, expert), sorted.
struct alignas(16) RoutePlan {
    int groups, most;    // most: pairs of a group
    int each, more;      // tiles of gate and up that every block has, and how many blocks have one more
    int fit, together;   // tiles whose sums can wait at once; groups of which all tiles of down can
    unsigned number;     // of the ROUTE that made it: see plan_number
    int unused;
    uint32_t group[moe::FEW_PAIRS];  // expert, first place (from bit 16 on), pairs (from bit 22 on)
    float weight[moe::FEW_PAIRS];    // by place
    uint8_t token[moe::FEW_PAIRS];   // by place
    int8_t places[moe::FEW_PAIRS];   // by token, rising; -1: none
};

struct Experts {
    const RoutePlan* plan;
    const void* shared;      // [T, D] of the shared expert, as `out` is
    moe::Job first, second;  // without plans, weights and factors
    void* out;               // [T, D] float or bf16
    mhc::Peers peers;        // whom the result is told instead of being written; size 0: nobody
    int out_f32, tokens;
    int halvings[2], width[2];  // of gate and up, and of down: a tile has 2^halvings pieces; blocks of a slice, or 0
    int2 of_block;              // tiles of down that every block has, and how many blocks have one more
    int room;                   // rows of mid that are staged at a time
    int undo, results, parked;  // where in the work area
};

// A piece of a tile. A warp takes every WARPS-th.
struct alignas(16) Routed {
    const uint8_t* from;
    int bytes;
    uint32_t what;  // the tile's number in the block, piece, first place and pairs of its group

    __device__ __forceinline__ int number() const { return what & 0x1FFFF; }
    __device__ __forceinline__ int piece() const { return what >> 17 & 15; }
    __device__ __forceinline__ int first() const { return what >> 21 & 63; }
    __device__ __forceinline__ int count() const { return what >> 27; }
};
// Where a piece finds its columns of x and leaves the sums of its last slice, in bytes: what depends on neither pass nor lane.
struct alignas(16) Placed {
    int x, slot;
    uint32_t rows;  // of x, four bits a token; of down from that of the group's first place on
    int count;      // tokens
};
constexpr int AHEAD = MAX_STAGES, PIECES = 2 * AHEAD;  // of each warp, known at a time: work is at most AHEAD behind

// The work area begins with this. Rows of x, then of mid, follow as they are multiplied, the factors that undo their
// scaling, results of down [tile][place][16], and sums of slices [tile][pair of its group][slice][8][row g, row g + 8].
struct alignas(128) ExpertsWork {
    RoutePlan plan;
    float alpha[moe::FEW_PAIRS][4];  // by group: of gate, up and down
    Routed list[WARPS][PIECES];
    Placed placed[WARPS][PIECES];
};
constexpr int STAGED_AT = sizeof(ExpertsWork), SLOT_BYTES = 64;  // of a slice's sums

// fit: pairs of a tile and a token whose sums can wait, of gate and up and of down.
struct ExpertsLayout {
    int tiles, room, undo, results, parked, fit[2], least;  // tiles: of down, in a block at most; least: bytes

    __host__ ExpertsLayout(int tokens, int topk, int D, int F, int grid, int work_bytes) {
        const int pairs = tokens * topk, one = moe::stride_of((F + 63) / 64), rows = tokens * moe::stride_of((D + 63) / 64);
        const int slots[] = {64 << moe::cuts_of((D + 63) / 64), 64 << moe::cuts_of((F + 63) / 64)};
        tiles = (D / 16 + grid - 1) / grid, room = pairs < TOKENS ? pairs : TOKENS;
        const auto fixed = [&](int room) {
            return STAGED_AT + max(rows, room * one) + max(tokens, room) * moe::MOST_SLICES * 4 + tiles * pairs * 32;
        };
        const int some = max(slots[0], tiles * slots[1]) * room;  // the largest group's
        least = fixed(room) + some;
        while (room < pairs && fixed(room + 1) + 2 * some <= work_bytes) ++room;
        undo = STAGED_AT + max(rows, room * one), results = undo + max(tokens, room) * moe::MOST_SLICES * 4;
        parked = results + tiles * pairs * 32;
        for (int down = 0; down < 2; ++down) fit[down] = (work_bytes - parked) / slots[down];
    }
};

// That which a plan has that the ROUTE of this number in this launch has made; an earlier one has another.
__device__ __forceinline__ unsigned plan_number(int route) { return position().base + static_cast<unsigned>(route); }

template <typename T>
__device__ __forceinline__ T* work_at(int offset) {
    return reinterpret_cast<T*>(memory() + WORK_AT + offset);
}

// What a block has to do, and a warp of it.
struct Units {
    int begin, count;       // tiles of gate and up, of all groups one after the other
    int first_tile, tiles;  // rows of down
    int up, all;            // pieces of the warp: of gate and up; with those of down behind them

    __device__ __forceinline__ Units(const Experts& a, int groups, int each, int more) {
        const int2 some = moe::part_of(make_int2(each, more)), rows = moe::part_of(a.of_block);
        begin = some.x, count = some.y, first_tile = rows.x, tiles = rows.y;
        up = pieces(count << a.halvings[0]), all = up + pieces(groups * tiles << a.halvings[1]);
    }
    // The warp's, of so many that all warps take in turn.
    static __device__ __forceinline__ int pieces(int all) { return (all + WARPS - 1 - static_cast<int>(threadIdx.x / 32)) >> 4; }
    // The group of a tile, and its number there.
    __device__ __forceinline__ int2 find(const Experts& a, bool down, int number) const {
        const int at = down ? number : begin + number, across = down ? tiles : a.first.rows, group = moe::quotient(at, across);
        return make_int2(group, at - group * across);
    }
};

// The warp's pieces from `from` on, a lane each. low, high: words of the plan's groups `lane` and `lane` + 32.
static __device__ __forceinline__ void list_units(const Experts& a, const Units& units, uint32_t low, uint32_t high, int from,
                                                  int count) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, index = from + lane;
    const bool down = index >= units.up;
    const moe::Job& job = down ? a.second : a.first;
    const int unit = warp + WARPS * (down ? index - units.up : index), number = unit >> a.halvings[down];
    const int piece = unit - (number << a.halvings[down]), blocks = job.blocks;
    const int2 tile = units.find(a, down, number);
    const uint32_t below = __shfl_sync(moe::ALL, low, tile.x), above = __shfl_sync(moe::ALL, high, tile.x);
    const uint32_t group = tile.x < 32 ? below : above;
    const int64_t row = static_cast<int64_t>(group & 0xFFFF) * job.rows + tile.y + (down ? units.first_tile : 0);
    const int begin = moe::piece_begin(blocks, piece, a.halvings[down]);
    const int end = moe::piece_begin(blocks, piece + 1, a.halvings[down]);
    if (lane < count)
        work<ExpertsWork>().list[warp][index & (PIECES - 1)] = {job.tiles + (row * blocks + begin) * w4::BLOCK_BYTES,
                                                          (end - begin) * w4::BLOCK_BYTES,
                                                          number | piece << 17 | group >> 16 << 21};
    __syncwarp();
}

// The same pieces, once the plan is in shared memory.
static __device__ __forceinline__ void place_units(const Experts& a, const Units& units, int from, int count) {
    ExpertsWork& w = work<ExpertsWork>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, index = from + lane;
    const bool down = index >= units.up;
    const int blocks = down ? a.second.blocks : a.first.blocks, halvings = a.halvings[down], cuts = moe::cuts_of(blocks);
    if (lane < count) {
        const Routed piece = {nullptr, 0, w.list[warp][index & (PIECES - 1)].what};
        const int begin = moe::piece_begin(blocks, piece.piece(), halvings);
        const int slice = ((piece.piece() + 1) << (cuts - halvings)) - 1;
        Placed placed = {begin * 128 + (down ? piece.first() * moe::stride_of(blocks) : 0),
                         ((piece.number() * w.plan.most << cuts) + slice) * SLOT_BYTES, 0, piece.count()};
#pragma unroll 1
        for (int m = 0; m < min(piece.count(), TOKENS); ++m)
            placed.rows |= static_cast<uint32_t>(down ? m : w.plan.token[piece.first() + m]) << 4 * m;
        w.placed[warp][index & (PIECES - 1)] = placed;
    }
    __syncwarp();
}

// A warp's ring, and what it asks for: its routed weights. What the list of the stream has behind them is asked for when all
// are multiplied: until then nobody waits for it, and here every instruction counts.
struct Feed {
    Stream& stream;
    const Routed* list;
    int all, next = 0;

    // Opens the next of its pieces, if there is one.
    __device__ __forceinline__ bool open() {
        if (__all_sync(moe::ALL, next == all)) return false;
        const Routed piece = list[next++ & (PIECES - 1)];
        stream.open(piece.from, piece.bytes, CHUNK);
        return true;
    }
    __device__ __forceinline__ void fill(int most) {
        stream.fill(most, [&] { return open(); });
    }
    // After fill(stages): the ring is full, or all is asked for, so that the chunk's place is the one to ask for.
    __device__ __forceinline__ void refill() {
        __syncwarp();  // every lane has read the chunk
        const bool one = elected();
        if (__any_sync(moe::ALL, stream.left > 0) || open()) stream.ask(stream.head, one);
        else --stream.held;
        stream.advance();
    }
};

}  // namespace dsv4::persistent
