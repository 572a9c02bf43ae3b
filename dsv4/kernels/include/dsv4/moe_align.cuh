// From the experts of T tokens to work: (token, expert) pairs sorted by expert, equal ones by pair, and groups of at
// most `group` of them that share an expert. Every rank is a count, so nothing depends on the order of threads.
#pragma once
#include <dsv4/dependent.cuh>
#include <dsv4/moe_job.cuh>

namespace dsv4::moe {

constexpr int ALIGN_THREADS = 1024, ALIGN_WARPS = ALIGN_THREADS / 32, MAX_EXPERTS = ALIGN_THREADS;

// Exclusive sums of two counts per thread over the block.
__device__ __forceinline__ int2 sums_before(int2 x, int2* parts) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int2 sum = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int a = __shfl_up_sync(0xffffffffu, sum.x, step), b = __shfl_up_sync(0xffffffffu, sum.y, step);
        if (lane >= step) sum.x += a, sum.y += b;
    }
    if (lane == 31) parts[warp] = sum;
    __syncthreads();
    int2 before = {0, 0};
    for (int w = 0; w < warp; ++w) before.x += parts[w].x, before.y += parts[w].y;
    return {before.x + sum.x - x.x, before.y + sum.y - x.y};
}

// Block b ranks pairs 1024 b .. 1024 b + 1023 among all, block 0 lists the groups. Shared: int [18, E].
__global__ void __launch_bounds__(ALIGN_THREADS)
    align(const int64_t* ids, int64_t pairs, int topk, int first_expert, int experts, int group, Plan plan) {
    extern __shared__ int counts[];
    wait_for_previous();
    let_next_start();
    __shared__ int2 parts[ALIGN_WARPS];
    int* all = counts;               // [E] pairs of an expert; then the place of its first
    int* earlier = counts + experts;  // [E] those in earlier blocks
    uint16_t* in_warp = reinterpret_cast<uint16_t*>(counts + 2 * experts);  // [ALIGN_WARPS, E]
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * ALIGN_THREADS;
    for (int i = thread; i < (2 + ALIGN_WARPS / 2) * experts; i += ALIGN_THREADS) counts[i] = 0;
    __syncthreads();
    const auto expert_of = [&](int64_t pair) {
        const int64_t id = pair < pairs ? ids[pair] - first_expert : -1;
        return id >= 0 && id < experts ? static_cast<int>(id) : -1;
    };
    for (int64_t pair = thread; pair < pairs; pair += ALIGN_THREADS) {
        const int expert = expert_of(pair);
        if (expert >= 0) atomicAdd(all + expert, 1);
        if (expert >= 0 && pair < begin) atomicAdd(earlier + expert, 1);
    }
    const int64_t pair = begin + thread;
    const int mine = expert_of(pair);
    const unsigned alike = __match_any_sync(0xffffffffu, mine), before = alike & ((1u << lane) - 1);
    if (mine >= 0 && before == 0) in_warp[warp * experts + mine] = __popc(alike);
    __syncthreads();
    const int own = thread < experts ? all[thread] : 0, groups = (own + group - 1) / group;
    const int2 start = sums_before({own, groups}, parts);
    if (blockIdx.x == 0 && thread < experts) {
        for (int i = 0; i < groups; ++i)
            plan.groups[start.y + i] = {thread, start.x + i * group, min(group, own - i * group), 0};
        if (thread == experts - 1) *plan.count = start.y + groups;
    }
    __syncthreads();
    if (thread < experts) all[thread] = start.x;
    __syncthreads();
    if (pair >= pairs) return;
    int place = -1;
    if (mine >= 0) {
        place = all[mine] + earlier[mine] + __popc(before);
        for (int w = 0; w < warp; ++w) place += in_warp[w * experts + mine];
        plan.pairs[place] = static_cast<int>(pair);
    }
    // Among its token's pairs; those left out come last.
    const int64_t first = pair / topk * topk;
    int slot = 0;
    for (int64_t other = first; other < first + topk; ++other) {
        const int theirs = expert_of(other);
        const bool less = static_cast<unsigned>(theirs) < static_cast<unsigned>(mine);  // -1 is the largest
        slot += less || (theirs == mine && other < pair);
    }
    plan.places[first + slot] = place;
}

}  // namespace dsv4::moe
