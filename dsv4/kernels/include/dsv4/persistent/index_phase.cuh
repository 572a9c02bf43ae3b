// INDEX: index_topk of a decode step's rows. Longer ones than TOGETHER: index_ranges.cuh. Else each by a group of blocks:
// every block scores a part of the entries and tells the others their keys through the L2 cache in one trip (exchange.cuh),
// then finds the threshold of all of them and writes its part of the selection. LINEAR may go on in the other blocks
// meanwhile, of what INDEX does not need.
#pragma once
#include <dsv4/exchange.cuh>
#include <dsv4/index_score.cuh>
#include <dsv4/index_select.cuh>
#include <dsv4/persistent/index_pairs.cuh>
#include <dsv4/persistent/index_ranges.cuh>
#include <dsv4/persistent/memory.cuh>

namespace dsv4::persistent {

// What the blocks of a group tell each other of a row.
struct IndexWords {
    exchange::Word fours[index::TOGETHER / 4];  // of keys, in two values
    uint32_t turns[GROUP];                      // the last turn, as each block counts it
};

struct Index {
    index::Arguments of;
    IndexWords* words;   // [rows]; zeros before its first use, then left alone
    ranges::Told* told;  // in its place where blocks have ranges
    int first;           // the group of row 0; the other rows' follow
    int blocks;          // that have ranges of a row, 0: a row has a group
};

struct IndexWork {
    index::Heads<4, WARPS> heads;
    index::Selection<THREADS> selection;
    uint64_t fours[index::TOGETHER / 4];
    pairs::Shared pairs;
    index::Tiles tiles[pairs::PAIRS];
    const int64_t* pages;  // of the row
    uint32_t turn;
};

// Away from the blocks that have most to do in other phases, which are the first and the last. (beside.py knows it.)
constexpr int INDEX_GROUP = 12;

// The row of this block's group, -1 for none.
static __device__ __forceinline__ int index_row(const Index& phase) {
    const int groups = gridDim.x / GROUP, group = blockIdx.x / GROUP;
    const int row = group - phase.first + (group < phase.first ? groups : 0);
    return group < groups && row < phase.of.rows ? row : -1;
}

// Whether this block has no part in the next phase and passes over it: a LINEAR beside an INDEX has no tiles in the blocks
// that work on a row. Else they would have to wait for its description and then for that of the phase behind it.
static __device__ __forceinline__ bool passes_over_next(int turn) {
    const Phase& phase = phase_at(turn);
    return phase.kind == INDEX && phase.joined & NEXT && index_row(payload<Index>(turn)) >= 0;
}

// After come() behind the phases in front, of kinds `before`: all that does not need them. Entries that they complete are
// not read here.
template <bool RARE>
static __device__ __forceinline__ void index_ahead(int turn, int before) {
    const Index& phase = payload<Index>(turn);
    const index::Arguments& a = phase.of;
    if (among(before, SEAM)) __syncthreads();  // seam_rest has read
    if (RARE && phase.blocks > 0) return ranges::ahead(a, phase.told, phase.blocks);
    const int row = index_row(phase), rank = blockIdx.x % GROUP, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row < 0) return;
    IndexWork& s = work<IndexWork>();
    const uint32_t turns = threadIdx.x == 0 ? exchange::last_turn(&phase.words[row].turns[rank]) : 0;
    index::start_turns(a, s.heads, row);
    const index::Tiles tiles = index::find_tiles<pairs::PAIRS>(a, row, rank, warp % pairs::PAIRS);
    index::clear_heads(a, s.heads);
    index::clear(s.selection);
    if (threadIdx.x == 0) s.turn = turns + 1, s.pages = index::pages_of(a, row);
    if (warp >= pairs::PAIRS) return;
    if (lane == 0) s.tiles[warp] = tiles;
    index::prefetch(a, tiles, warp * GROUP + rank);
}

// First behind the meeting, as everything waits for them: the heads of a group's row are on their way.
template <bool RARE>
static __device__ __forceinline__ void start_index(int turn) {
    const Index& phase = payload<Index>(turn);
    const int row = index_row(phase);
    if (RARE && phase.blocks > 0 || row < 0) return;
    IndexWork& s = work<IndexWork>();
    if (s.tiles[0].n > 0) index::start_heads(phase.of, s.heads, row);
}

// This thread's keys, once they have been told; their upper digits are counted.
static __device__ __forceinline__ void hear_keys(const index::Share<THREADS>& share, const exchange::Word* words,
                                                 uint32_t turn, uint64_t* fours, uint32_t* upper) {
    exchange::Word heard[index::Share<THREADS>::MOST] = {};
    bool here;
    do {
        here = true;
#pragma unroll
        for (int i = 0; i < index::Share<THREADS>::MOST; ++i)
            if (i < share.count) {
                heard[i] = exchange::look(words + share.first + i);
                here &= heard[i].turn == turn;
            }
    } while (!here);
#pragma unroll
    for (int i = 0; i < index::Share<THREADS>::MOST; ++i) {
        if (i >= share.count) break;  // one jump
        const uint64_t four = static_cast<uint64_t>(__float_as_uint(heard[i].values[1])) << 32 |
                              __float_as_uint(heard[i].values[0]);
        fours[share.first + i] = four;
        index::count_upper(upper, four);
    }
}

static_assert(sizeof(IndexWork) <= sizeof(ranges::Work), "the work area is no larger for it");

template <bool RARE>
static __device__ __forceinline__ void index_phase(int turn) {
    const Index& phase = payload<Index>(turn);
    const index::Arguments& a = phase.of;
    if (RARE && phase.blocks > 0) return ranges::phase(a, phase.told, phase.blocks);
    const int row = index_row(phase), rank = blockIdx.x % GROUP;
    if (row < 0) return;
    IndexWork& s = work<IndexWork>();
    const index::Tiles tiles = s.tiles[threadIdx.x / 32 % pairs::PAIRS];
    if (tiles.n == 0) {
        index::take_all(a, row, rank * THREADS + threadIdx.x, GROUP * THREADS);
        return;
    }
    IndexWords& words = phase.words[row];
    const uint32_t number = s.turn;
    pairs::score_row<RARE>(a, s.heads, s.pairs, row, s.pages, rank, tiles, [&](int at, uint64_t four) {
        const float values[exchange::PER_WORD] = {__uint_as_float(static_cast<uint32_t>(four)),
                                                  __uint_as_float(static_cast<uint32_t>(four >> 32)), 0.0f};
        if (threadIdx.x % 32 < 4) exchange::tell(&words.fours[at], values, number);
    });
    const index::Share<THREADS> share(s.pages, tiles.n, rank, GROUP, s.fours);
    hear_keys(share, words.fours, number, s.fours, s.selection.bins + index::BINS);
    index::select(s.selection, share, a.out + row * a.width, a.topk);
    if (threadIdx.x == 0) words.turns[rank] = number;
}

// Bytes of scratch: zeros at first. Programs of such a grid may share it.
constexpr int index_scratch(int grid, int rows) {
    const int groups = rows * static_cast<int>(sizeof(IndexWords)), told = ranges::told_bytes(grid);
    return groups > told ? groups : told;
}

// 16-byte aligned scratch. joined: the next phase is a LINEAR that needs nothing of this and has no tiles in the groups
// that work.
static cudaError_t describe_index(Phase* phase, INDEX_PARAMETERS, void* scratch, int grid, int joined) {
    const int groups = grid / GROUP;
    if (rows < 1 || rows > TOKENS || rows > grid || width < 1 || cis == nullptr || heads > 64) return cudaErrorInvalidValue;
    Index a = {};
    if (const cudaError_t error = index::arguments(a.of, INDEX_VALUES)) return error;
    if (n_pages * index::PAGE > index::TOGETHER) {
        a.blocks = grid / static_cast<int>(rows);
        const int pages = (n_pages + a.blocks - 1) / a.blocks;
        if (pages * index::PAGE > index::RANGE || !ranges::sums_fit(n_pages, a.blocks) || grid > MAX_BLOCKS || joined)
            return cudaErrorInvalidValue;
        a.of.blocks = 1, a.told = static_cast<ranges::Told*>(scratch);
    } else {
        if (rows > groups) return cudaErrorInvalidValue;
        a.of.blocks = GROUP, a.words = static_cast<IndexWords*>(scratch), a.first = INDEX_GROUP % groups;
    }
    if (const cudaError_t error = fill_phase(phase, INDEX, a)) return error;
    phase->joined = (joined ? NEXT : 0) | (a.blocks > 0 || !a.of.packed ? RARE_PHASE : 0);
    return cudaSuccess;
}

}  // namespace dsv4::persistent
