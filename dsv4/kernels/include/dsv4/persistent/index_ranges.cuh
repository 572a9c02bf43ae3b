// INDEX of rows that have more entries than a group's blocks keep: the blocks are divided among the rows, each scores a
// range of the entries and keeps their keys. For either digit of the threshold the blocks of a row tell each other in one
// trip (exchange.cuh) how many of their keys have which; so each knows the threshold and what lies in front of its range,
// and writes its part of the selection. How many blocks have a range follows from how many entries the row has now.
#pragma once
#include <dsv4/exchange.cuh>
#include <dsv4/index_score.cuh>
#include <dsv4/index_select.cuh>
#include <dsv4/persistent/memory.cuh>

namespace dsv4::persistent::ranges {

constexpr int LEAST = WARPS * index::ENTRIES / index::PAGE;  // pages of a block: fewer leave warps without entries
constexpr int IN_WORD = 2 * exchange::PER_WORD, WORDS = (index::BINS + IN_WORD - 1) / IN_WORD;  // counts of 16 bits
static_assert(index::RANGE <= 0xFFFF && WORDS * IN_WORD <= index::BINS + 4, "counts fit");

// What blocks tell each other. Zeros before its first use, then left alone.
struct Told {
    alignas(16) uint32_t turns[TOKENS];  // of each row the last one; then [rows, 2, blocks of a row, WORDS] counts

    __device__ __forceinline__ exchange::Word* counts(int row, int digit, int blocks) {
        return reinterpret_cast<exchange::Word*>(this + 1) + (2 * row + digit) * blocks * WORDS;
    }
};
constexpr int told_bytes(int grid) {
    return static_cast<int>(sizeof(Told)) + 2 * grid * WORDS * static_cast<int>(sizeof(exchange::Word));
}

struct Work {
    index::Heads<4, WARPS> heads;
    index::Selection<THREADS> selection;  // bins: of this block's keys
    index::Counts counts[2];
    uint64_t fours[index::RANGE / 4];
    index::Tiles tiles[WARPS];
    index::Range range;
    int n;          // what the row has to choose from; 0: it takes all it sees
    uint32_t turn;
};

// By all blocks of a row in front of a meeting. of.blocks is 1: sixteens of a range go to its block's warps in turn.
static __device__ __forceinline__ void ahead(const index::Arguments& a, const Told* told, int blocks) {
    const int row = blockIdx.x / blocks, rank = blockIdx.x % blocks, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= a.rows) return;
    Work& s = work<Work>();
    const uint32_t turns = threadIdx.x == 0 ? exchange::last_turn(&told->turns[row]) : 0;
    const int n = index::to_score(a, a.sequence[row], a.visible[row]);
    const index::Range range(n, rank, blocks, LEAST);
    if (threadIdx.x == 0) s.n = n, s.turn = turns + 1, s.range = range;
    if (range.count == 0) return;
    index::start_turns(a, s.heads, row);
    index::Tiles tiles = index::find_tiles<WARPS>(a, row, range.first / index::ENTRIES, warp);
    tiles.n = range.first + range.count;
    index::clear_heads(a, s.heads);
    index::clear(s.selection);
    uint32_t* counts = reinterpret_cast<uint32_t*>(s.counts);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof s.counts) / 4; i += THREADS) counts[i] = 0;
    if (lane == 0) s.tiles[warp] = tiles;
    index::prefetch(a, tiles, warp);
}

// By the first threads: this block's counts of a digit.
static __device__ __forceinline__ void tell_counts(exchange::Word* words, const uint32_t* bins, uint32_t turn) {
    const int first = threadIdx.x * IN_WORD;
    if (first >= index::BINS) return;
    float values[exchange::PER_WORD];
#pragma unroll
    for (int i = 0; i < exchange::PER_WORD; ++i) {
        const int bin = first + 2 * i;
        values[i] = __uint_as_float(bin < index::BINS ? bins[bin] | bins[bin + 1] << 16 : 0);
    }
    exchange::tell(words + threadIdx.x, values, turn);
}

// A thread hears a word of every STEP-th block, and its sums fit into 16 bits as well.
constexpr int STEP = THREADS / WORDS, MOST = (MAX_BLOCKS + STEP - 1) / STEP;
constexpr bool sums_fit(int pages, int blocks) {
    return (blocks + STEP - 1) / STEP * ((pages + blocks - 1) / blocks) * index::PAGE <= 0xFFFF;
}
static_assert(MOST * LEAST * index::PAGE <= 0xFFFF, "sums fit");

// Adds up what `blocks` blocks tell. The counts are zero.
static __device__ __forceinline__ void hear_counts(index::Counts& counts, const exchange::Word* words, int blocks,
                                                   int rank, uint32_t turn) {
    const int word = threadIdx.x % WORDS, first = threadIdx.x / WORDS;  // block first, first + STEP, ...
    if (first >= STEP) return;
    exchange::Word heard[MOST] = {};
    for (bool here = false; !here;) {  // only those that are late are looked at again
        here = true;
#pragma unroll
        for (int i = 0; i < MOST; ++i)
            if (first + i * STEP < blocks && heard[i].turn != turn)
                heard[i] = exchange::look(words + threadIdx.x + i * (STEP * WORDS)), here = false;
    }
    uint32_t all[exchange::PER_WORD] = {}, before[exchange::PER_WORD] = {};
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
        const bool in_front = first + i * STEP < rank;
#pragma unroll
        for (int k = 0; k < exchange::PER_WORD; ++k) {
            const uint32_t two = __float_as_uint(heard[i].values[k]);
            all[k] += two;
            if (in_front) before[k] += two;
        }
    }
#pragma unroll
    for (int k = 0; k < exchange::PER_WORD; ++k) {
        if (all[k] == 0) continue;
        const int bin = word * IN_WORD + 2 * k;
        atomicAdd(&counts.all[bin], all[k] & 0xFFFF);
        atomicAdd(&counts.all[bin + 1], all[k] >> 16);
        atomicAdd(&counts.before[bin], before[k] & 0xFFFF);
        atomicAdd(&counts.before[bin + 1], before[k] >> 16);
    }
}

static __device__ __forceinline__ void phase(const index::Arguments& a, Told* told, int blocks) {
    const int row = blockIdx.x / blocks, rank = blockIdx.x % blocks, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= a.rows) return;
    Work& s = work<Work>();
    const int n = s.n;
    if (n == 0) {
        index::take_all(a, row, rank * THREADS + threadIdx.x, blocks * THREADS);
        return;
    }
    if (s.range.count == 0) return;
    index::start_heads(a, s.heads, row);
    uint32_t* upper = s.selection.bins + index::BINS;
    const int first = s.range.first;
    index::score_row<4, WARPS>(a, s.heads, row, index::pages_of(a, row), first / index::ENTRIES, warp, s.tiles[warp],
                               [&](int at, uint64_t four) {
        if (lane < 4) s.fours[at - first / 4] = four;
        const uint32_t key = static_cast<uint32_t>(four >> lane / 4 * 16) & 0xFFFF;
        if (lane < 16) atomicAdd(&upper[key >> index::DIGIT_BITS], 1u);  // each one of sixteen
    });
    const index::Range range = s.range;
    const index::Share<THREADS> share(index::pages_of(a, row) + range.first / index::PAGE, range.count, 0, 1, s.fours);
    const int working = (s.n + range.each * index::PAGE - 1) / (range.each * index::PAGE);
    const uint32_t number = s.turn;
    index::Search search(a.topk);
#pragma unroll 1
    for (int digit = 1; digit >= 0; --digit) {
        uint32_t* bins = s.selection.bins + digit * index::BINS;
        if (digit == 0) index::count_digit(bins, share, 0, search.edge);
        __syncthreads();
        exchange::Word* words = told->counts(row, digit, blocks);
        tell_counts(words + rank * WORDS, bins, number);
        hear_counts(s.counts[digit], words, working, rank, number);
        __syncthreads();
        index::narrow(search, s.counts[digit]);
    }
    // All with a range have read the number: this block has heard from them.
    if (rank == 0 && threadIdx.x == 0) told->turns[row] = number;
    index::write_chosen(s.selection, share, search, a.out + row * a.width);
}

}  // namespace dsv4::persistent::ranges
