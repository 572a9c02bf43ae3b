// What every block of a launch for up to eight tokens works out for itself: the pairs sorted by expert, as in
// moe_align.cuh, its share of the tiles, and the order in which a warp takes and asks for them.
#pragma once
#include <dsv4/bulk.cuh>
#include <dsv4/moe_job.cuh>

namespace dsv4::moe {

constexpr int FEW_TOKENS = 8, FEW_PAIRS = 64, FEW_WARPS = 16, FEW_THREADS = FEW_WARPS * 32;
constexpr int CHUNK_BLOCKS = 4, CHUNK = CHUNK_BLOCKS * w4::BLOCK_BYTES, MOST_CHUNKS = 12;  // of a warp's ring
constexpr int PARTS = FEW_THREADS / FEW_PAIRS, NOBODY = 0x7fffffff;

struct Few {
    Job first, second;  // their plans are not used
    const int64_t* ids;
    const void* shared;  // bf16, or float where out is
    int64_t shared_row;
    void* out;
    unsigned* arrivals;  // [2], zero between launches
    int tokens, first_expert, experts, out_f32;
    int room;       // rows of mid that are staged at a time
    int staged;     // bytes for staged rows
    int chunks;     // of all rings together
    int2 of_block;  // tiles of down that every block has, and how many blocks have one more
    int halvings;   // how often a tile of gate and up is cut, so that few of them keep all warps busy
    int parked;     // bytes for the sums of such tiles
};

struct FewPlan {
    int4 groups[FEW_PAIRS];                      // expert, first place, count
    int expert[FEW_PAIRS], places[FEW_PAIRS];    // by pair; by token, rising
    float given[FEW_PAIRS];                      // weights by pair
    int token[FEW_PAIRS];                        // by place
    int2 leads[FEW_PAIRS];                       // by place: expert and size of the group that begins here, or no size
    float weight[FEW_PAIRS];                     // by place
};

// a / b, rounded down, of counts below MOST_ITEMS: the half outweighs the error of the reciprocal.
constexpr int MOST_ITEMS = 1 << 20;
__device__ __forceinline__ int quotient(int a, int b) {
    float one;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(one) : "f"(static_cast<float>(b)));
    return static_cast<int>((static_cast<float>(a) + 0.5f) * one);
}

// This thread's lane; volatile, so that a loop does not ask for it again and again.
__device__ __forceinline__ int lane_id() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

__device__ __forceinline__ uint64_t below(int bit) { return bit < 64 ? (uint64_t{1} << bit) - 1 : ~uint64_t{0}; }

// The places that one staging of mid serves: those of whole groups.
struct Batch {
    int group, groups;  // the first, and how many
    int from, to;       // places
};

// What a block has to do.
struct Share {
    uint64_t leaders;        // places at which a group begins
    int places, groups;      // places: pairs whose expert exists
    int begin, count;        // tiles of gate and up, of all groups one after the other
    int first_tile, tiles;   // rows of down
    int warps;               // that work

    __device__ __forceinline__ int groups_before(int place) const { return __popcll(leaders & below(place)); }

    // The batch after place `from`, of at most `room` places (room >= TOKENS).
    __device__ __forceinline__ Batch batch(int from, int room) const {
        const int to = from + room >= places ? places : 63 - __clzll(leaders & below(from + room + 1));
        const int group = groups_before(from);
        return {group, groups_before(to) - group, from, to};
    }
};

// Thread i < FEW_PAIRS. expert: that of pair i, or NOBODY, also beyond the last pair; weight: its weight.
__device__ __forceinline__ void enter_pair(FewPlan& s, int expert, float weight) {
    s.expert[threadIdx.x] = expert, s.given[threadIdx.x] = weight, s.leads[threadIdx.x] = {NOBODY, 0};
}

// Of the pairs that have been entered.
__device__ __forceinline__ Share plan_few(FewPlan& s, int tokens, int topk) {
    const int pairs = tokens * topk, thread = threadIdx.x, lane = thread % 32;
    __syncthreads();
    const int pair = thread / PARTS, token = quotient(pair, topk), mine = s.expert[pair];
    unsigned counts = 0;  // of those before it, of their like among them, of all alike, of its token's before it
    for (int other = thread % PARTS; other < pairs; other += PARTS) {
        const int theirs = s.expert[other];
        const bool same = theirs == mine, before = theirs < mine || (same && other < pair);
        const bool near = static_cast<unsigned>(other - token * topk) < static_cast<unsigned>(topk);
        counts += before + ((same && other < pair) << 8) + (same << 16) + ((before && near) << 24);
    }
#pragma unroll
    for (int step = 1; step < PARTS; step *= 2) counts += __shfl_xor_sync(ALL, counts, step);
    const int place = counts & 255, like = counts >> 8 & 255, alike = counts >> 16 & 255, slot = counts >> 24;
    if (thread % PARTS == 0 && pair < pairs) {
        s.places[token * topk + slot] = mine == NOBODY ? -1 : place;
        if (mine != NOBODY) {
            s.token[place] = token, s.weight[place] = s.given[pair];
            if (like % TOKENS == 0) s.leads[place] = {mine, min(alike - like, TOKENS)};
        }
    }
    __syncthreads();
    const auto bits = [&](bool low, bool high) {
        return __ballot_sync(ALL, low) | static_cast<uint64_t>(__ballot_sync(ALL, high)) << 32;
    };
    Share share;
    share.leaders = bits(s.leads[lane].y != 0, s.leads[lane + 32].y != 0);
    share.places = __popcll(bits(s.expert[lane] != NOBODY, s.expert[lane + 32] != NOBODY));
    share.groups = __popcll(share.leaders);
    if (thread < FEW_PAIRS && s.leads[thread].y != 0)
        s.groups[share.groups_before(thread)] = make_int4(s.leads[thread].x, thread, s.leads[thread].y, 0);
    __syncthreads();
    return share;
}

// A block's part of what gives every block so many items and the first few one more: the first of them, how many.
__device__ __forceinline__ int2 part_of(int2 of_block) {
    const int block = blockIdx.x, each = of_block.x, more = of_block.y;
    return make_int2(each * block + min(block, more), each + (block < more));
}

// What this block has to do, of which each group has so many tiles of gate and up.
__device__ __forceinline__ void deal(Share& share, int rows, int2 of_block) {
    const int all = share.groups * rows, each = quotient(all, gridDim.x);
    const int2 first = part_of(make_int2(each, all - each * gridDim.x)), second = part_of(of_block);
    share.begin = first.x, share.count = first.y, share.first_tile = second.x, share.tiles = second.y;
}

// Of a pass, which is over so many groups times `across` tiles, the tiles that a warp takes: every warps-th.
struct Walk {
    int at, end, group, tile;
};
struct Steps {
    int warps, group, tile, across;

    __device__ __forceinline__ Steps(int warps, int tiles) : warps(warps), across(max(tiles, 1)) {
        group = warps < across ? 0 : quotient(warps, across), tile = warps - group * across;
    }
    // first: the group at which the pass begins; the block's tiles of it are `count` from `begin` on.
    __device__ __forceinline__ Walk start(int first, int begin, int count, int warp) const {
        const int at = begin + warp, ahead = quotient(at, across);
        return {at, warp < warps ? begin + count : 0, first + ahead, at - ahead * across};
    }
    __device__ __forceinline__ void advance(Walk& walk) const {
        walk.at += warps, walk.group += group, walk.tile += tile;
        if (walk.tile >= across) walk.tile -= across, ++walk.group;
    }
};

}  // namespace dsv4::moe
