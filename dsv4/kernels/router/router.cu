// router: one warp per token.
#include <cassert>
#include <dsv4/dependent.cuh>

using namespace dsv4;

namespace {

constexpr int WARPS = 4;
constexpr unsigned ALL = 0xffffffffu;

// Larger float, larger key; NaN is the largest of all, as in torch.sort, and no float has key 0.
__device__ __forceinline__ uint32_t order(float x) {
    if (isnan(x)) return ALL;
    const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 equals +0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score(float logit) { return sqrtf(logit > 20.0f ? logit : log1pf(expf(logit))); }

__global__ void router(const float* logits, const float* bias, const int64_t* tid2eid, const int64_t* tokens,
                       int64_t* ids, float* weights, int64_t rows, int experts, int64_t stride, int topk,
                       int64_t vocabulary, float route_scale) {
    extern __shared__ uint32_t keys[];  // [WARPS, E]
    take_turn();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + warp;
    if (row >= rows) return;
    const float* logit = logits + row * stride;
    int64_t chosen = 0;  // lane k < K: the k-th expert
    if (tid2eid != nullptr) {
        const int64_t token = tokens[row];
        assert(token >= 0 && token < vocabulary && "router: a token id outside tid2eid");
        if (lane < topk) chosen = tid2eid[token * topk + lane];
        assert(chosen >= 0 && chosen < experts && "router: tid2eid names an expert that does not exist");
    } else {
        uint32_t* key = keys + warp * experts;
        for (int e = lane; e < experts; e += 32) key[e] = order(score(logit[e]) + (bias == nullptr ? 0.0f : bias[e]));
        for (int k = 0; k < topk; ++k) {
            uint64_t best = 0;  // key, then the complement of the expert: equal keys, lower expert
            for (int e = lane; e < experts; e += 32) {
                const uint64_t candidate = static_cast<uint64_t>(key[e]) << 32 | (ALL - e);
                best = candidate > best ? candidate : best;
            }
#pragma unroll
            for (int step = 16; step > 0; step /= 2) {
                const uint64_t other = __shfl_xor_sync(ALL, best, step);
                best = other > best ? other : best;
            }
            const int expert = ALL - static_cast<uint32_t>(best);
            if (lane == k) chosen = expert;
            if (lane == expert % 32) key[expert] = 0;  // each lane reads only the keys it writes
        }
    }
    const float picked = lane < topk ? score(logit[chosen]) : 0.0f;
    float sum = 0.0f;
    for (int k = 0; k < topk; ++k) sum += __shfl_sync(ALL, picked, k);
    if (lane < topk) {
        ids[row * topk + lane] = chosen;
        weights[row * topk + lane] = picked / sum * route_scale;
    }
}

}  // namespace

extern "C" int dsv4_router(const float* logits, const float* bias, const int64_t* tid2eid, const int64_t* tokens,
                           int64_t* ids, float* weights, int64_t rows, int experts, int64_t stride, int topk,
                           int64_t vocabulary, float route_scale, cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    const size_t shared_bytes = tid2eid == nullptr ? WARPS * experts * sizeof(uint32_t) : 0;
    return launch_dependent(router, (rows + WARPS - 1) / WARPS, 1, WARPS * 32, shared_bytes, stream, logits, bias, tid2eid,
                            tokens, ids, weights, rows, experts, stride, topk, vocabulary, route_scale);
}
