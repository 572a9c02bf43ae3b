// The best `topk` of a row's keys (16 bits that sort like the scores) by several blocks: every block finds the threshold,
// digit by digit, with histograms, and writes its part of the selection. Blocks have all keys in shared memory, or each has
// a range of them there and is told what the others count.
#pragma once
#include <dsv4/index_key.cuh>
#include <dsv4/reduce.cuh>

namespace dsv4::index {

constexpr int TOGETHER = 8192, CLUSTER = 8;  // entries of a row and blocks that choose from them, at most
constexpr int DIGIT_BITS = 8, BINS = 1 << DIGIT_BITS;

template <int THREADS>
struct Selection {
    alignas(16) uint32_t bins[2 * BINS];  // of the lower digit, then of the upper
    uint32_t warps[THREADS / 32];
};

template <int THREADS>
__device__ __forceinline__ void clear(Selection<THREADS>& s) {
    for (int i = threadIdx.x; i < 2 * BINS; i += THREADS) s.bins[i] = 0;
}

// The smallest power of two above x >= 0. A function of its own: templates may not name what only the GPU has.
__device__ __forceinline__ int power_above(int x) { return 1 << (32 - __clz(x)); }

// The keys of a thread, by fours, 0 (less than all keys) for an entry that is not there, and whether it is one of those
// that write theirs.
template <int THREADS>
struct Share {
    static constexpr int MOST = TOGETHER / 4 / THREADS;
    int each;          // fours that are a thread's, a power of two; they lie in one page
    int first, count;  // of them all, and how many are there
    const uint64_t* fours;
    bool writes;  // of the warps, each `blocks`-th does
    int64_t page;

    // all: every thread's fours.
    __device__ __forceinline__ Share(const int64_t* pages, int n, int rank, int blocks, const uint64_t* all)
        : each(power_above((n - 1) / (4 * THREADS))), first(each * threadIdx.x), fours(all + first) {
        writes = static_cast<int>(threadIdx.x) / 32 % blocks == rank && 4 * first < n;
        page = writes ? pages[4 * first / PAGE] : 0;
        count = min(each, (n + 3) / 4 - first);
    }
    // Where visit() begins so that lanes that are served together, sixteen of them, meet different banks.
    __device__ __forceinline__ int apart() const { return static_cast<int>(threadIdx.x) % 32 * each / 16; }

    // see(key, entry) of every key. `begin`: 0, and they come in order; or apart().
    template <typename See>
    __device__ __forceinline__ void visit(int begin, See see) const {
#pragma unroll 1
        for (int i = 0; i < each; ++i) {
            const int at = (begin + i) & (each - 1);
            if (at >= count) continue;
            const uint64_t four = fours[at];
#pragma unroll
            for (int k = 0; k < 4; ++k) see(static_cast<uint32_t>(four >> 16 * k & 0xFFFF), 4u * (first + at) + k);
        }
    }
};

// The sum over the threads before this one. One barrier.
template <int WARPS>
__device__ __forceinline__ uint32_t sum_before(uint32_t x, uint32_t (&warps)[WARPS]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t sum = sum_up_to(x);
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    return sum - x + __reduce_add_sync(0xffffffffu, lane < warp ? warps[lane] : 0);
}

// A digit, and how many of the keys that have it are wanted.
struct Digit {
    uint32_t bin, left;
};

// That of the left-th largest of the keys that are counted in bins. Every warp finds the same.
__device__ __forceinline__ Digit find_digit(const uint32_t* bins, uint32_t left) {
    constexpr int EACH = BINS / 32;
    static_assert(EACH == 8, "three questions find one of so many bins");
    uint32_t bin = BINS - 1 - EACH * (threadIdx.x % 32);  // a lane's bins go down from here
    const uint4* own = reinterpret_cast<const uint4*>(bins) + bin / 4;
    const uint4 upper = own[0], lower = own[-1];
    uint32_t sums[EACH] = {upper.w, upper.z, upper.y, upper.x, lower.w, lower.z, lower.y, lower.x};
#pragma unroll
    for (int i = 1; i < EACH; ++i) sums[i] += sums[i - 1];
    const uint32_t all = sums[EACH - 1], sum = sum_up_to(all);
    const int found = __ffs(__ballot_sync(0xffffffffu, sum >= left)) - 1;
    const uint32_t wanted = left - (sum - all);  // of the bins of lane `found`; other lanes' values are not used
    uint32_t above = 0;  // of the sums, which rise, the last that is less
    const auto passes = [&](uint32_t sum, int bins) {
        const bool less = sum < wanted;
        if (less) above = sum, bin -= bins;
        return less;
    };
    const bool far = passes(sums[3], 4), mid = passes(far ? sums[5] : sums[1], 2);
    passes(mid ? far ? sums[6] : sums[2] : far ? sums[4] : sums[0], 1);
    const uint32_t both = __shfl_sync(0xffffffffu, bin << 24 | ((wanted - above) & 0xFFFFFF), found);
    return {both >> 24, both & 0xFFFFFF};
}

// Counts the digit at bit `shift` of this block's keys that begin with `edge`, the digits above. The bins are empty.
template <int THREADS>
__device__ __forceinline__ void count_digit(uint32_t* bins, const Share<THREADS>& share, int shift, uint32_t edge) {
    share.visit(share.apart(), [&](uint32_t key, uint32_t) {
        if (key >> shift >> DIGIT_BITS == edge) atomicAdd(&bins[key >> shift & (BINS - 1)], 1u);
    });
}

// What is chosen: keys above `edge` and the first `left` that equal it; and how many are above it and equal to it in
// front of this block's keys. Until all digits of the edge are known: of the keys that begin with those, `left` are.
struct Search {
    uint32_t edge = 0, left, higher = 0, same = 0;

    __device__ __forceinline__ explicit Search(uint32_t topk) : left(topk) {}
    __device__ __forceinline__ void take(const Digit& next) { edge = edge << DIGIT_BITS | next.bin, left = next.left; }
};

// Finds the topk-th largest of more keys, whose upper digits all threads have counted. The lower bins are empty.
template <int THREADS>
__device__ __forceinline__ Search threshold(Selection<THREADS>& s, const Share<THREADS>& share, uint32_t topk) {
    Search search(topk);
    __syncthreads();
    search.take(find_digit(s.bins + BINS, search.left));
    count_digit(s.bins, share, 0, search.edge);
    __syncthreads();
    search.take(find_digit(s.bins, search.left));
    return search;
}

// Writes what is chosen of the keys that all threads have a share of. One barrier.
template <int THREADS>
__device__ __forceinline__ void write_chosen(Selection<THREADS>& s, const Share<THREADS>& share, const Search& found,
                                             int64_t* out) {
    const uint32_t edge = found.edge;
    uint32_t count = 0;  // above the edge | equal to it << 16
    share.visit(share.apart(),
                [&](uint32_t key, uint32_t) { count += key > edge ? 1u : key == edge ? 0x10000u : 0u; });
    const uint32_t before = sum_before(count, s.warps);
    if (!share.writes || count == 0) return;
    uint32_t higher = found.higher + (before & 0xFFFF), same = found.same + (before >> 16);
    share.visit(0, [&](uint32_t key, uint32_t entry) {
        if (key > edge || (key == edge && same < found.left))
            out[higher + min(same, found.left)] = share.page * PAGE + entry % PAGE;
        higher += key > edge, same += key == edge;
    });
}

// Counts the upper digits of four keys.
__device__ __forceinline__ void count_upper(uint32_t* bins, uint64_t four) {
#pragma unroll
    for (int k = 0; k < 4; ++k) atomicAdd(&bins[four >> (16 * k + DIGIT_BITS) & (BINS - 1)], 1u);
}

// Every thread of every block calls this with its share of the same keys. It has counted their upper digits.
template <int THREADS>
__device__ __forceinline__ void select(Selection<THREADS>& s, const Share<THREADS>& share, int64_t* out, int topk) {
    write_chosen(s, share, threshold(s, share, topk), out);
}

constexpr int RANGE = 32768;  // keys of a block that has a range of them, at most

// How many keys have each digit, of all blocks and of those in front of this one. (Room for whole words of persistent/.)
struct Counts {
    alignas(16) uint32_t all[BINS + 4];
    alignas(16) uint32_t before[BINS + 4];
};

// The next digit of the edge is found. Every warp finds the same.
__device__ __forceinline__ void narrow(Search& search, const Counts& counts) {
    const Digit digit = find_digit(counts.all, search.left);
    uint32_t higher = 0;
#pragma unroll
    for (uint32_t bin = threadIdx.x % 32; bin < BINS; bin += 32) higher += bin > digit.bin ? counts.before[bin] : 0;
    search.higher += __reduce_add_sync(0xffffffffu, higher);
    search.same = counts.before[digit.bin];
    search.take(digit);
}

// A block's range: so many pages for each, and which entries it has. Ranges rise with the blocks' ranks.
struct Range {
    int each, first, count;  // pages of a block; the first entry, and how many of them are there

    __device__ __forceinline__ Range(int n, int rank, int blocks, int least)
        : each(max(((n + PAGE - 1) / PAGE + blocks - 1) / blocks, least)), first(rank * each * PAGE),
          count(max(min(n - first, each * PAGE), 0)) {}
};

}  // namespace dsv4::index
