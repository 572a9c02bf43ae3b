// Thresholds of a row of scores that the blocks of a cluster hold in shared memory, each a slice of it: the k-th largest
// score, or the one at which the mass of the larger ones reaches a share of the whole.
// Scores are at most 0; a score's key is its bits without the sign, so the smaller key is the larger score.
// Histograms add integers (a mass in units of 2^-44): the same sums in whatever order the threads come.
#pragma once
#include <dsv4/cluster.cuh>

namespace dsv4::select {

constexpr int CLUSTER = 8, THREADS = 512;
constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS, GROUPS = BINS / 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr uint32_t FORBIDDEN = 0x7f800000u;  // the key of -inf

// Rows are cut into equal slices of whole float4.
__host__ __device__ constexpr int slice_width(int n) { return (n + CLUSTER * 4 - 1) / (CLUSTER * 4) * 4; }

struct Histogram {
    uint2 bins[BINS];  // low and high half of each sum
    uint64_t groups[GROUPS];
    uint64_t before, needed;  // what warp 0 found: the sum ahead of `bin`, and the sum sought
    int bin;
};

__device__ __forceinline__ uint32_t key_of(float score) { return __float_as_uint(score) & 0x7fffffffu; }
__device__ __forceinline__ float score_of(uint32_t key) { return -__uint_as_float(key); }
__device__ __forceinline__ uint64_t mass_of(float score) { return __float2ull_rn(expf(score) * 0x1p44f); }
// Rises with the key. `spread`: bins per unit of score.
__device__ __forceinline__ int coarse_bin(float score, float spread) {
    return min(__float2int_rz(-score * spread), BINS - 1);
}

// Bins per unit of score for scores that go down to `lowest`; 0 where that makes no sense.
__device__ __forceinline__ float spread_of(float lowest) {
    const float spread = static_cast<float>(BINS - 1) / -lowest;
    return spread > 0.0f && spread < 1e30f ? spread : 0.0f;
}

__device__ __forceinline__ void add(uint2* bin, uint64_t weight) {
    const uint32_t low = static_cast<uint32_t>(weight), old = atomicAdd(&bin->x, low);
    const uint32_t high = static_cast<uint32_t>(weight >> 32) + (old > ~low);  // each overflow is seen once
    if (high != 0) atomicAdd(&bin->y, high);
}

__device__ __forceinline__ uint64_t prefix(uint64_t x) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(ALL, x, step);
        if (lane >= step) x += other;
    }
    return x;
}

// Warp 0 of every block: the bin in which the sum over all blocks reaches h.needed, or, where share > 0, that share of
// the whole, which becomes h.needed.
__device__ inline void cross(Histogram& h, float share) {
    const int lane = threadIdx.x;
    uint64_t a = 0, b = 0;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) {
        a += peer_value(&h.groups[2 * lane], rank);
        b += peer_value(&h.groups[2 * lane + 1], rank);
    }
    uint64_t sum = prefix(a + b), needed = h.needed;
    if (share > 0.0f)
        needed = __double2ull_ru(static_cast<double>(share) * static_cast<double>(__shfl_sync(ALL, sum, 31)));
    int first = __ffs(__ballot_sync(ALL, sum >= needed)) - 1;
    uint64_t before = sum - a - b;
    const bool second = before + a < needed;
    const int group = __shfl_sync(ALL, 2 * lane + second, first);
    before = __shfl_sync(ALL, second ? before + a : before, first);
    uint64_t weight = 0;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank)
        weight += peer_value(reinterpret_cast<const uint64_t*>(&h.bins[group * 32 + lane]), rank);
    sum = before + prefix(weight);
    first = __ffs(__ballot_sync(ALL, sum >= needed)) - 1;
    before = __shfl_sync(ALL, sum - weight, first);
    __syncwarp();
    if (lane == 0) {
        h.bin = group * 32 + first;
        h.before = before;
        h.needed = needed;
    }
}

// Of the scores with keys up to `limit`: the smallest key whose scores, with all larger ones, reach `needed` in number
// or, where MASS, `share` of the mass of all of them. There is such a key: 1 <= needed <= their number, 0 < share < 1.
// All threads of the cluster call this; scores[0 .. count) is this block's slice, written before a barrier.
template <bool MASS>
__device__ uint32_t threshold(Histogram& h, const float* scores, int count, uint32_t limit, float spread,
                              uint64_t needed, float share) {
    uint32_t low = 0, high = limit;
    int chosen = 0, shift = 0;
    if (threadIdx.x == 0) h.needed = needed;
    for (int pass = 0;; ++pass) {
        for (int i = threadIdx.x; i < BINS; i += THREADS) h.bins[i] = make_uint2(0, 0);
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += THREADS) {
            const float score = scores[i];
            const uint32_t key = key_of(score);
            int bin = coarse_bin(score, spread);
            if (pass == 0) {
                if (key > limit) continue;
            } else {
                if (bin != chosen || key - low > high - low) continue;
                bin = (key - low) >> shift;
            }
            if (!MASS) {
                atomicAdd(&h.bins[bin].x, 1u);
            } else if (const uint64_t mass = mass_of(score)) {
                add(&h.bins[bin], mass);
            }
        }
        __syncthreads();
        uint64_t part = 0;  // 8 threads sum a group of 32 bins
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint2 bin = h.bins[threadIdx.x * 4 + k];
            part += static_cast<uint64_t>(bin.y) << 32 | bin.x;
        }
#pragma unroll
        for (int step = 4; step > 0; step /= 2) part += __shfl_xor_sync(ALL, part, step);
        if (threadIdx.x % 8 == 0) h.groups[threadIdx.x / 8] = part;
        cluster_barrier();
        if (threadIdx.x < 32) cross(h, pass == 0 ? share : 0.0f);
        cluster_barrier();  // nobody clears a histogram that another block still reads
        const int bin = h.bin;
        if (pass == 0) {  // the keys of that bin, and a few more on either side where rounding may have cut
            chosen = bin;
            if (spread > 0.0f) {
                const uint32_t from = key_of(static_cast<float>(bin) / spread);
                low = from > 4 ? from - 4 : 0;
                if (bin < BINS - 1) high = min(high, key_of(static_cast<float>(bin + 1) / spread) + 4);
            }
        } else {
            if (shift == 0) return low + bin;
            low += static_cast<uint32_t>(bin) << shift;
            high = min(high, low + (1u << shift) - 1);
        }
        shift = max(0, 32 - __clz(high - low) - BIN_BITS);
        __syncthreads();  // h.bin was read
        if (threadIdx.x == 0) h.needed -= h.before;
    }
}

}  // namespace dsv4::select
