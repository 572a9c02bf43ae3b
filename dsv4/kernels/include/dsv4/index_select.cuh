// The best `topk` of a row's keys (16 bits that sort like the scores) by several blocks, each of which has all of them, in
// its threads' registers: every block finds the threshold, with a histogram over the range of the keys, and writes its part
// of the selection.
#pragma once
#include <dsv4/index_key.cuh>
#include <dsv4/reduce.cuh>

namespace dsv4::index {

constexpr int TOGETHER = 8192, CLUSTER = 8;  // entries of a row and blocks that choose from them, at most
constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS, FINE_BINS = 1 << (16 - BIN_BITS);

struct Keys4 {
    uint2 words;
    __device__ uint32_t operator[](int i) const {
        const uint32_t word = i < 2 ? words.x : words.y;
        return i % 2 ? word >> 16 : word & 0xFFFF;
    }
};

template <int THREADS>
struct Selection {
    alignas(16) uint32_t bins[BINS];
    uint32_t fine[FINE_BINS], warps[2][THREADS / 32];
    uint32_t bin, left;
};

template <int THREADS>
__device__ __forceinline__ void clear(Selection<THREADS>& s) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
    if (threadIdx.x < FINE_BINS) s.fine[threadIdx.x] = 0;
}

// The smallest power of two above x >= 0. A function of its own: templates may not name what only the GPU has.
__device__ __forceinline__ int power_above(int x) { return 1 << (32 - __clz(x)); }

// The keys of a thread, by fours, 0 for an entry that is not there, and whether it is one of those that write theirs.
template <int THREADS>
struct Share {
    static constexpr int MOST = TOGETHER / 4 / THREADS;
    int first, count;  // fours; they lie in one page
    bool writes;       // of the warps, each `blocks`-th does
    int64_t page;
    Keys4 fours[MOST];

    __device__ __forceinline__ Share(const int64_t* pages, int n, int rank, int blocks)
        : count(power_above((n - 1) / (4 * THREADS))) {
        first = count * threadIdx.x;
        writes = static_cast<int>(threadIdx.x) / 32 % blocks == rank && 4 * first < n;
        page = writes ? pages[4 * first / PAGE] : 0;
    }
    __device__ __forceinline__ void take(const uint64_t* scores, int n) {
        const uint2* words = reinterpret_cast<const uint2*>(scores) + first;
#pragma unroll
        for (int i = 0; i < MOST; ++i)
            fours[i].words = i < count && 4 * (first + i) < n ? words[i] : make_uint2(0, 0);
    }
    // each(key, four, place in it) of every key that is there.
    template <typename Each>
    __device__ __forceinline__ void visit(Each each) const {
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            if (i >= count) return;
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (fours[i][k]) each(fours[i][k], first + i, k);
        }
    }
};

// The range of some keys: the largest << 32 | the smallest.
__device__ __forceinline__ uint64_t span_of(uint32_t low, uint32_t high) {
    low = __reduce_min_sync(0xffffffffu, low), high = __reduce_max_sync(0xffffffffu, high);
    return static_cast<uint64_t>(high) << 32 | low;
}
__device__ __forceinline__ uint64_t whole_span(const uint64_t* spans, int count) {
    uint32_t low = 0xFFFF, high = 0;
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < count; i += 32) {
        const uint64_t span = spans[i];
        low = min(low, static_cast<uint32_t>(span)), high = max(high, static_cast<uint32_t>(span >> 32));
    }
    return span_of(low, high);
}

// The sum over the threads before this one. One barrier; `warps` is this call's own.
template <int WARPS>
__device__ __forceinline__ uint32_t sum_before(uint32_t x, uint32_t (&warps)[WARPS]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t sum = sum_up_to(x);
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    return sum - x + __reduce_add_sync(0xffffffffu, lane < warp ? warps[lane] : 0);
}

// The topk-th largest of more keys, and how many that equal it are taken. The bins are empty.
template <int THREADS>
__device__ __forceinline__ uint32_t threshold(Selection<THREADS>& s, const Share<THREADS>& share, uint64_t span,
                                              uint32_t topk, uint32_t& equals) {
    constexpr int EACH = BINS / THREADS;
    const int lane = threadIdx.x % 32;
    const uint32_t low = static_cast<uint32_t>(span), high = static_cast<uint32_t>(span >> 32);
    const int shift = max(0, 32 - __clz(high - low) - BIN_BITS);  // a bin per key if their range allows it
    share.visit([&](uint32_t key, int, int) { atomicAdd(&s.bins[(key - low) >> shift], 1u); });
    __syncthreads();
    const int top = BINS - 1 - EACH * threadIdx.x;  // this thread's bins, from the top
    uint32_t own[EACH], all = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) all += own[i] = s.bins[top - i];
    uint32_t above = sum_before(all, s.warps[0]);
    if (above < topk && topk <= above + all)
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (above < topk && topk <= above + own[i]) s.bin = top - i, s.left = topk - above;
            above += own[i];
        }
    __syncthreads();
    const uint32_t bin = s.bin, left = s.left;
    if (shift == 0) {
        equals = left;
        return low + bin;
    }
    share.visit([&](uint32_t key, int, int) {
        if ((key - low) >> shift == bin) atomicAdd(&s.fine[(key - low) & ((1 << shift) - 1)], 1u);
    });
    __syncthreads();
    const int code = FINE_BINS - 1 - lane;  // a lane per key, from the top
    const uint32_t here = s.fine[code], sum = sum_up_to(here);
    const int found = __ffs(__ballot_sync(0xffffffffu, sum >= left)) - 1;
    equals = left - __shfl_sync(0xffffffffu, sum - here, found);
    return low + (bin << shift) + (FINE_BINS - 1 - found);
}

// Every thread of every block calls this with its share of the same keys.
template <int THREADS>
__device__ __forceinline__ void select(Selection<THREADS>& s, const Share<THREADS>& share, uint64_t span, int64_t* out,
                                       int topk) {
    uint32_t equals, count = 0;  // count: above the edge | equal to it << 16
    const uint32_t edge = threshold(s, share, span, topk, equals);
    share.visit([&](uint32_t key, int, int) { count += key > edge ? 1u : key == edge ? 0x10000u : 0u; });
    const uint32_t before = sum_before(count, s.warps[1]);
    if (!share.writes) return;
    uint32_t higher = before & 0xFFFF, same = before >> 16;
    share.visit([&](uint32_t key, int four, int k) {
        const int64_t row = share.page * PAGE + (4 * four + k) % PAGE;
        if (key > edge)
            out[higher++ + min(same, equals)] = row;
        else if (key == edge && same++ < equals)
            out[higher + same - 1] = row;
    });
}

}  // namespace dsv4::index
