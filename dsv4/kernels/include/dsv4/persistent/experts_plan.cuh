// What ROUTE leaves for EXPERTS, what EXPERTS is given, how it lays its work area out, and the order in which a warp
// takes pieces of tiles and asks for their weights.
#pragma once
#include <dsv4/moe_few_product.cuh>
#include <dsv4/peers.cuh>
#include <dsv4/persistent/stream.cuh>

namespace dsv4::persistent {

static_assert(WARPS == 16 && WARPS == moe::FEW_WARPS && TOKENS == moe::TOKENS && CHUNK == moe::CHUNK, "a phase is like the op's kernel");

// The pairs (token, expert), sorted: every block makes it of what it is told of each pair. It outlives ROUTE.
struct alignas(16) RoutePlan {
    int groups, pairs;  // pairs: whose expert exists
    int each, more;     // tiles of gate and up that every block has, and how many blocks have one more
    uint32_t group[moe::FEW_PAIRS];  // expert, first place (from bit 16 on), pairs (from bit 22 on); 0: none
    float weight[moe::FEW_PAIRS];    // by place
    uint8_t token[moe::FEW_PAIRS];   // by place
    uint8_t of[moe::FEW_PAIRS];      // by place: its group
    int8_t places[moe::FEW_PAIRS];   // by token, rising; -1: none
};
static_assert(sizeof(RoutePlan) == ROUTED_BYTES && ROUTED_AT % alignof(RoutePlan) == 0, "memory.cuh has place for it");

__device__ __forceinline__ RoutePlan& routed_plan() { return *reinterpret_cast<RoutePlan*>(memory() + ROUTED_AT); }

// Blocks are told of the pair that comes at a place: its expert, and its token from bit 16 on.
constexpr int NO_EXPERT = 0xFFFF;

// Of one half of the places, a lane each: what receive_plan is told.
struct PlanHalf {
    int expert = NO_EXPERT, token = 0;

    __device__ __forceinline__ PlanHalf(const exchange::Value& word, bool told) {
        const uint32_t what = __float_as_uint(word.value);
        if (told) expert = what & 0xFFFF, token = what >> 16;
    }
    __device__ __forceinline__ bool exists() const { return expert != NO_EXPERT; }
};

// By the speaker's warp: waits for the words of all `pairs` pairs and makes the plan of them, but for `places` and weights.
// rows: tiles of gate and up of a group. Groups are pairs of one expert, at most TOKENS.
static __device__ __forceinline__ void receive_plan(const uint64_t* words, int pairs, int rows, unsigned number) {
    RoutePlan& plan = routed_plan();
    const int lane = threadIdx.x % 32;
    const bool two = pairs > 32;
    plan.group[lane] = plan.group[lane + 32] = 0;
    exchange::Value word[2] = {};
    bool waits;
    do {
        word[0] = exchange::look_at_value(words + lane);
        waits = lane < pairs && word[0].turn != number;
        if (two) {
            word[1] = exchange::look_at_value(words + lane + 32);
            waits |= lane + 32 < pairs && word[1].turn != number;
        }
    } while (__any_sync(moe::ALL, waits));
    const PlanHalf low(word[0], lane < pairs), high(word[1], lane + 32 < pairs);
    const auto bits = [&](bool a, bool b) {
        const uint32_t above = two ? __ballot_sync(moe::ALL, b) : 0;
        return __ballot_sync(moe::ALL, a) | static_cast<uint64_t>(above) << 32;
    };
    const int before = __shfl_up_sync(moe::ALL, low.expert, 1), last = __shfl_sync(moe::ALL, low.expert, 31);
    const int before_high = __shfl_up_sync(moe::ALL, high.expert, 1);
    const uint64_t begins = bits(low.exists() && (lane == 0 || before != low.expert),
                                 high.exists() && (lane == 0 ? last : before_high) != high.expert);
    const int all = __popcll(bits(low.exists(), high.exists()));
    const auto leads = [&](const PlanHalf& half, int place) {
        return half.exists() && (place - 63 + __clzll(begins & moe::below(place + 1))) % moe::TOKENS == 0;
    };
    const bool leads_low = leads(low, lane), leads_high = two && leads(high, lane + 32);
    const uint64_t leaders = bits(leads_low, leads_high);
    __syncwarp();  // the groups are 0
    const auto put = [&](const PlanHalf& half, int place, bool leads) {
        const uint64_t behind = leaders & ~moe::below(place + 1);
        const int of = __popcll(leaders & moe::below(place + 1)) - 1, end = min(all, __popcll(~behind & (behind - 1)));
        if (leads) plan.group[of] = half.expert | place << 16 | (end - place) << 22;
        plan.token[place] = static_cast<uint8_t>(half.token), plan.of[place] = static_cast<uint8_t>(max(of, 0));
    };
    put(low, lane, leads_low);
    if (two) put(high, lane + 32, leads_high);
    const int groups = __popcll(leaders), tiles = groups * rows, each = moe::quotient(tiles, gridDim.x);
    if (lane == 0) *reinterpret_cast<int4*>(&plan) = make_int4(groups, all, each, tiles - each * gridDim.x);
}

// By a warp: waits for the weights of all pairs, which are told behind those.
static __device__ __forceinline__ void receive_weights(const uint64_t* words, unsigned number) {
    RoutePlan& plan = routed_plan();
#pragma unroll 1
    for (int place = threadIdx.x % 32; place < plan.pairs; place += 32) {
        exchange::Value word;
        do word = exchange::look_at_value(words + place);
        while (word.turn != number);
        plan.weight[place] = word.value;
    }
}

// By a warp, before rows move up: the places of each token's pairs.
static __device__ __forceinline__ void list_places(int tokens, int topk) {
    RoutePlan& plan = routed_plan();
    const int lane = threadIdx.x % 32, all = plan.pairs;
    const int low = lane < all ? plan.token[lane] : TOKENS, high = lane + 32 < all ? plan.token[lane + 32] : TOKENS;
    plan.places[lane] = plan.places[lane + 32] = -1;
    __syncwarp();
#pragma unroll 1
    for (int token = 0; token < tokens; ++token) {
        const uint32_t one = __ballot_sync(moe::ALL, low == token), two = __ballot_sync(moe::ALL, high == token);
        const uint32_t before = (1u << lane) - 1;
        int8_t* const places = plan.places + token * topk;
        if (low == token) places[__popc(one & before)] = static_cast<int8_t>(lane);
        if (high == token) places[__popc(one) + __popc(two & before)] = static_cast<int8_t>(lane + 32);
    }
}

struct Experts {
    const void* shared;      // [T, D] of the shared expert, as `out` is
    const uint64_t* weights; // words of every place, told by the phase in front
    moe::Job first, second;  // without plans, weights and factors
    void* out;               // [T, D] float or bf16
    mhc::Peers peers;        // whom the result is told instead of being written; size 0: nobody
    int out_f32, tokens;
    int halvings[2], width[2];  // of gate and up, and of down: a tile has 2^halvings pieces; blocks of a slice, or 0
    int2 of_block;              // tiles of down that every block has, and how many blocks have one more
    int fit;                    // sums of gate and up, of a tile and a pair, that can wait at once if x has all rows
    int room;                   // rows of mid that are staged at a time
    int staged, results, parked[2], end;  // where in the work area
};

// A piece of a tile. A warp takes every WARPS-th.
struct alignas(16) Routed {
    const uint8_t* from;
    int bytes;
    uint32_t what;  // the number of the tile's first sum, piece, first place and pairs of its group

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

// The work area begins with this. The factors that undo the scaling of rows follow, then rows of x as they are multiplied,
// and sums [tile, and of it pair of its group][slice][8][row g, row g + 8]; when all blocks have met, rows of mid, results of
// down [tile][place][16], and such sums.
struct alignas(128) ExpertsWork {
    float alpha[moe::FEW_PAIRS][4];  // by group: of gate, up and down
    Routed list[WARPS][PIECES];
    Placed placed[WARPS][PIECES];
    int begin;  // the number of the block's first sum of gate and up
};
constexpr int UNDO_AT = sizeof(ExpertsWork), SLOT_BYTES = 64;  // of a slice's sums

// Of gate and up, then of down: where rows begin (staged), sums (parked).
struct ExpertsLayout {
    int fit, room, staged, results, parked[2], least;  // least: bytes

    __host__ ExpertsLayout(int tokens, int topk, int D, int F, int grid, int work_bytes) {
        const int pairs = tokens * topk, blocks[] = {(D + 63) / 64, (F + 63) / 64};
        const int slots[] = {SLOT_BYTES << moe::cuts_of(blocks[0]), SLOT_BYTES << moe::cuts_of(blocks[1])};
        const int some = pairs < TOKENS ? pairs : TOKENS;  // the largest group's
        const int tiles = (D / 16 + grid - 1) / grid;  // of down, in a block at most
        const auto lay = [&](int rows) {
            room = rows, staged = UNDO_AT + max(tokens, room) * moe::MOST_SLICES * 4;
            results = staged + room * moe::stride_of(blocks[1]);
            parked[0] = staged + tokens * moe::stride_of(blocks[0]), parked[1] = results + tiles * pairs * 32;
            least = max(parked[0] + some * slots[0], parked[1] + room * tiles * slots[1]);
        };
        int most = some;
        while (most < pairs && (lay(most + 1), least <= work_bytes)) ++most;
        lay(most);
        fit = (work_bytes - parked[0]) / slots[0];
    }
};

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
    const int sum = (group >> 16 & 63) * (down ? units.tiles : a.first.rows) + tile.y * static_cast<int>(group >> 22);
    if (warp + index == 0) work<ExpertsWork>().begin = sum;
    if (lane < count)
        work<ExpertsWork>().list[warp][index & (PIECES - 1)] = {job.tiles + (row * blocks + begin) * w4::BLOCK_BYTES,
                                                          (end - begin) * w4::BLOCK_BYTES,
                                                          sum | piece << 17 | group >> 16 << 21};
    __syncwarp();
}

// Where the same pieces find their rows, once those have moved up.
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
                         ((piece.number() << cuts) + slice) * SLOT_BYTES, 0, piece.count()};
#pragma unroll 1
        for (int m = 0; m < min(piece.count(), TOKENS); ++m)
            placed.rows |= static_cast<uint32_t>(down ? m : routed_plan().token[piece.first() + m]) << 4 * m;
        w.placed[warp][index & (PIECES - 1)] = placed;
    }
    __syncwarp();
}

// A warp's ring, and what it asks for: its routed weights, and then what the list of the stream has behind them, chunk by
// chunk: in one burst at the end it would be in front of what the next phase reads.
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
    // Asks for the first chunk of its pieces, if there is one, while nothing else is held.
    __device__ __forceinline__ void begin() {
        if (!open()) return;
        stream.ask(stream.head, elected());
        ++stream.held;
    }
    __device__ __forceinline__ void fill(int most) {
        stream.fill(most, [&] { return open() || stream.open_next(); });
    }
    // After fill(stages): the ring is full, or what comes next is not known and will not be here, so that the chunk's place is
    // the one to ask for.
    __device__ __forceinline__ void refill() {
        __syncwarp();  // every lane has read the chunk
        const bool one = elected();
        if (__any_sync(moe::ALL, stream.left > 0) || open() || stream.open_quickly()) stream.ask(stream.head, one);
        else --stream.held;
        stream.advance();
    }
};

}  // namespace dsv4::persistent
