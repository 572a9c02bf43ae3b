// Which experts a token goes to: by a block, whose threads score the experts and whose first warp then picks the largest
// K times, each lane among the keys of every 32nd expert; or from a table.
#pragma once
#include <cassert>
#include <dsv4/dependent.cuh>

namespace dsv4::routing {

constexpr int THREADS = 256;
constexpr unsigned ALL = 0xffffffffu;

struct Arguments {
    const float *logits, *bias;
    const int64_t *tid2eid, *tokens;
    int64_t* ids;
    float* weights;
    int experts, topk;
    int64_t stride, vocabulary;
    float route_scale;
};

// Larger float, larger key; NaN is the largest of all, as in torch.sort, and no float has key 0.
__device__ __forceinline__ uint32_t order(float x) {
    if (isnan(x)) return ALL;
    const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 equals +0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score(float logit) { return sqrtf(logit > 20.0f ? logit : log1pf(expf(logit))); }

// One warp; lane k < K holds the score of the k-th expert, and is told its weight.
__device__ __forceinline__ float weight_of(const Arguments& a, float picked) {
    constexpr int AT_ONCE = 8;
    float sum = 0.0f;
#pragma unroll 1
    for (int begin = 0; begin < a.topk; begin += AT_ONCE) {
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const float one = __shfl_sync(ALL, picked, begin + k);
            if (begin + k < a.topk) sum += one;
        }
    }
    return picked / sum * a.route_scale;
}

__device__ __forceinline__ void put(const Arguments& a, int64_t row, int64_t expert, float picked) {
    const int lane = threadIdx.x;
    const float weight = weight_of(a, picked);
    if (lane < a.topk) a.ids[row * a.topk + lane] = expert, a.weights[row * a.topk + lane] = weight;
}

// One warp; lane k < K is told the k-th best of EACH * 32 experts. Of equal keys the lower expert is taken. keys: aligned
// to 16 bytes.
template <int EACH>
__device__ __forceinline__ uint32_t best_of(const uint32_t* keys, int topk) {
    static_assert(EACH % 4 == 0, "a lane reads four at a time");
    const int lane = threadIdx.x % 32;
    uint32_t key[EACH];  // neighbours, so that the lower lane has the lower expert
    int expert[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
        const uint4 four = reinterpret_cast<const uint4*>(keys)[(lane * EACH + i) / 4];
        key[i] = four.x, key[i + 1] = four.y, key[i + 2] = four.z, key[i + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) expert[i] = lane * EACH + i;
    // A lane's largest first, equal ones by number: only neighbours change places, and equal ones do not. A loop, as code
    // that is not at hand takes longer than what it does.
#pragma unroll 1
    for (int round = 0; round < EACH / 2; ++round)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd)
#pragma unroll
            for (int i = odd; i + 1 < EACH; i += 2) {
                const bool rises = key[i + 1] > key[i];
                const uint32_t most = max(key[i], key[i + 1]);
                const int first = rises ? expert[i + 1] : expert[i];
                key[i + 1] = min(key[i], key[i + 1]), expert[i + 1] = rises ? expert[i] : expert[i + 1];
                key[i] = most, expert[i] = first;
            }
    uint32_t chosen = 0;
#pragma unroll 1
    for (int k = 0; k < topk; ++k) {
        const int first = __ffs(__ballot_sync(ALL, key[0] == __reduce_max_sync(ALL, key[0]))) - 1;
        const uint32_t best = __shfl_sync(ALL, expert[0], first);
        if (lane == k) chosen = best;
        if (lane == first) {
#pragma unroll
            for (int i = 0; i + 1 < EACH; ++i) key[i] = key[i + 1], expert[i] = expert[i + 1];
            key[EACH - 1] = 0;
        }
    }
    return chosen;
}

// EACH: keys a lane has. Read before the wait: the bias.
template <int EACH>
__device__ void best_experts(const Arguments& a, int64_t row) {
    __shared__ __align__(16) uint32_t keys[EACH * 32];
    __shared__ float scores[EACH * 32];
    constexpr int ROUNDS = (EACH * 32 + THREADS - 1) / THREADS;
    const int lane = threadIdx.x, thread = threadIdx.x;
    float bias[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int e = thread + i * THREADS;
        bias[i] = a.bias != nullptr && e < a.experts ? a.bias[e] : 0.0f;
    }
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int e = thread + i * THREADS;
        if (e >= EACH * 32) break;
        const float s = e < a.experts ? score(a.logits[row * a.stride + e]) : 0.0f;
        scores[e] = s, keys[e] = e < a.experts ? order(s + bias[i]) : 0;
    }
    __syncthreads();
    if (thread >= 32) return;
    const uint32_t chosen = best_of<EACH>(keys, a.topk);
    put(a, row, chosen, lane < a.topk ? scores[chosen] : 0.0f);
}

// One warp; lane k < K is told the k-th expert of the row's token.
__device__ __forceinline__ int64_t expert_of_token(const Arguments& a, int64_t row) {
    const int lane = threadIdx.x % 32;
    const int64_t token = a.tokens[row];
    assert(token >= 0 && token < a.vocabulary && "router: a token id outside tid2eid");
    const int64_t chosen = lane < a.topk ? a.tid2eid[token * a.topk + lane] : 0;
    assert(chosen >= 0 && chosen < a.experts && "router: tid2eid names an expert that does not exist");
    return chosen;
}

// One warp: the experts are those of the token.
__device__ inline void experts_of_token(const Arguments& a, int64_t row) {
    wait_for_previous();
    const int lane = threadIdx.x;
    const int64_t chosen = expert_of_token(a, row);
    put(a, row, chosen, lane < a.topk ? score(a.logits[row * a.stride + chosen]) : 0.0f);
}

// The block's part of a launch; waits for the kernel in front.
template <int EACH>
__device__ __forceinline__ void route(const Arguments& a, int64_t row) {
    if (a.tid2eid == nullptr) {
        best_experts<EACH>(a, row);
    } else if (threadIdx.x < 32) {
        experts_of_token(a, row);
    } else {
        wait_for_previous();
    }
}

}  // namespace dsv4::routing
