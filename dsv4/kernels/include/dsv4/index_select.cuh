// The best `topk` of a row's keys (16 bits that sort like the scores) by a cluster, each block of which holds all of them:
// every block finds the threshold, with a histogram over the range of the keys, and writes its part of the selection.
#pragma once
#include <dsv4/cluster.cuh>
#include <dsv4/index_key.cuh>
#include <dsv4/reduce.cuh>

namespace dsv4::index {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TOGETHER = 8192, CLUSTER = 8;  // entries of a row and blocks of a cluster, at most
constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS, BINS_EACH = BINS / THREADS, FINE_BINS = 1 << (16 - BIN_BITS);

struct Keys4 {
    uint2 words;
    __device__ uint32_t operator[](int i) const {
        const uint32_t word = i < 2 ? words.x : words.y;
        return i % 2 ? word >> 16 : word & 0xFFFF;
    }
};

struct Selection {
    alignas(16) uint32_t bins[BINS];
    uint64_t scores[TOGETHER / 4];    // keys by fours; 0: no entry
    uint64_t spans[CLUSTER * WARPS];  // of each warp of the cluster: its largest key << 32 | its smallest
    uint32_t fine[FINE_BINS], warps[2][WARPS];
    uint32_t bin, left;
};

__device__ __forceinline__ void clear(Selection& s) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
    if (threadIdx.x < FINE_BINS) s.fine[threadIdx.x] = 0;
}

// The sum over the threads before this one. One barrier; `warps` is this call's own.
__device__ __forceinline__ uint32_t sum_before(uint32_t x, uint32_t (&warps)[WARPS]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t sum = sum_up_to(x);
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    sum -= x;
#pragma unroll
    for (int i = 0; i < WARPS; ++i)
        if (i < warp) sum += warps[i];
    return sum;
}

// The topk-th largest of n > topk keys, and how many that equal it are taken. The bins are empty.
__device__ __forceinline__ uint32_t threshold(Selection& s, int n, uint32_t topk, int spans, uint32_t& equals) {
    const int lane = threadIdx.x % 32;
    uint32_t low = 0xFFFF, high = 0;
    for (int i = lane; i < spans; i += 32) {
        low = min(low, static_cast<uint32_t>(s.spans[i]));
        high = max(high, static_cast<uint32_t>(s.spans[i] >> 32));
    }
    low = __reduce_min_sync(0xffffffffu, low), high = __reduce_max_sync(0xffffffffu, high);
    const int shift = max(0, 32 - __clz(high - low) - BIN_BITS);  // a bin per key if their range allows it
    const uint2* scores = reinterpret_cast<const uint2*>(s.scores);
    for (int i = threadIdx.x; 4 * i < n; i += THREADS) {
        const Keys4 keys{scores[i]};
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (keys[k]) atomicAdd(&s.bins[(keys[k] - low) >> shift], 1u);
    }
    __syncthreads();
    const int top = BINS - 1 - BINS_EACH * threadIdx.x;  // this thread's bins, from the top
    uint32_t own[BINS_EACH], all = 0;
#pragma unroll
    for (int i = 0; i < BINS_EACH; ++i) all += own[i] = s.bins[top - i];
    uint32_t above = sum_before(all, s.warps[0]);
    if (above < topk && topk <= above + all)
#pragma unroll
        for (int i = 0; i < BINS_EACH; ++i) {
            if (above < topk && topk <= above + own[i]) s.bin = top - i, s.left = topk - above;
            above += own[i];
        }
    __syncthreads();
    const uint32_t bin = s.bin, left = s.left;
    if (shift == 0) {
        equals = left;
        return low + bin;
    }
    for (int i = threadIdx.x; 4 * i < n; i += THREADS) {
        const Keys4 keys{scores[i]};
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (keys[k] && (keys[k] - low) >> shift == bin) atomicAdd(&s.fine[(keys[k] - low) & ((1 << shift) - 1)], 1u);
    }
    __syncthreads();
    const int code = FINE_BINS - 1 - lane;  // a lane per key, from the top
    const uint32_t here = s.fine[code], sum = sum_up_to(here);
    const int found = __ffs(__ballot_sync(0xffffffffu, sum >= left)) - 1;
    equals = left - __shfl_sync(0xffffffffu, sum - here, found);
    return low + (bin << shift) + (FINE_BINS - 1 - found);
}

// All blocks of the cluster hold the same scores of n entries; of this one's warps, each `blocks`-th writes.
__device__ __forceinline__ void select(Selection& s, const int64_t* pages, int64_t* out, int n, int topk, int rank,
                                       int blocks) {
    const int fours = 1 << (32 - __clz((n - 1) / (4 * THREADS)));  // of each thread; they lie in one page
    const int first = fours * threadIdx.x;
    const bool writes = static_cast<int>(threadIdx.x) / 32 % blocks == rank && 4 * first < n;
    const int64_t page = writes ? pages[4 * first / PAGE] : 0;
    uint32_t equals;
    const uint32_t edge = threshold(s, n, topk, blocks * WARPS, equals);
    const uint2* scores = reinterpret_cast<const uint2*>(s.scores);
    uint32_t count = 0;  // above the edge | equal to it << 16
    for (int i = first; i < first + fours && 4 * i < n; ++i) {
        const Keys4 keys{scores[i]};
#pragma unroll
        for (int k = 0; k < 4; ++k) count += keys[k] > edge ? 1u : keys[k] == edge ? 0x10000u : 0u;
    }
    const uint32_t before = sum_before(count, s.warps[1]);
    if (!writes) return;
    uint32_t higher = before & 0xFFFF, same = before >> 16;
    for (int i = first; i < first + fours && 4 * i < n; ++i) {
        const Keys4 keys{scores[i]};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int64_t row = page * PAGE + (4 * i + k) % PAGE;
            if (keys[k] > edge)
                out[higher++ + min(same, equals)] = row;
            else if (keys[k] == edge && same++ < equals)
                out[higher + same - 1] = row;
        }
    }
}

}  // namespace dsv4::index
