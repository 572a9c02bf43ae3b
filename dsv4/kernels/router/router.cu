// router: a block per token. Its threads score the experts; the first warp then picks the largest K times, each lane
// among the keys of every 32nd expert.
#include <cassert>
#include <dsv4/dependent.cuh>

using namespace dsv4;

namespace {

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

// One warp; lane k < K holds the k-th expert and its score.
__device__ __forceinline__ void put(const Arguments& a, int64_t row, int64_t expert, float picked) {
    const int lane = threadIdx.x;
    float sum = 0.0f;
    for (int k = 0; k < a.topk; ++k) sum += __shfl_sync(ALL, picked, k);
    if (lane < a.topk) {
        a.ids[row * a.topk + lane] = expert;
        a.weights[row * a.topk + lane] = picked / sum * a.route_scale;
    }
}

// EACH: keys a lane has. Of equal keys the lower expert is taken.
template <int EACH>
__global__ void __launch_bounds__(THREADS) router(const __grid_constant__ Arguments a) {
    __shared__ uint32_t keys[EACH * 32];
    __shared__ float scores[EACH * 32];
    constexpr int ROUNDS = (EACH * 32 + THREADS - 1) / THREADS;
    const int lane = threadIdx.x, thread = threadIdx.x;
    const int64_t row = blockIdx.x;
    let_next_start();
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
    uint32_t key[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) key[i] = keys[lane + 32 * i];
    uint32_t chosen = 0;
    for (int k = 0; k < a.topk; ++k) {
        uint32_t best = key[0], at = lane;
#pragma unroll
        for (int i = 1; i < EACH; ++i)
            if (key[i] > best) best = key[i], at = lane + 32 * i;
        const uint32_t top = __reduce_max_sync(ALL, best);
        const uint32_t expert = __reduce_min_sync(ALL, best == top ? at : ALL);
        if (lane == k) chosen = expert;
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (lane + 32 * i == expert) key[i] = 0;
    }
    put(a, row, chosen, lane < a.topk ? scores[chosen] : 0.0f);
}

// One warp: the experts are those of the token.
__global__ void __launch_bounds__(32) router_hash(const __grid_constant__ Arguments a) {
    take_turn();
    const int lane = threadIdx.x;
    const int64_t row = blockIdx.x, token = a.tokens[row];
    assert(token >= 0 && token < a.vocabulary && "router: a token id outside tid2eid");
    int64_t chosen = 0;
    if (lane < a.topk) chosen = a.tid2eid[token * a.topk + lane];
    assert(chosen >= 0 && chosen < a.experts && "router: tid2eid names an expert that does not exist");
    put(a, row, chosen, lane < a.topk ? score(a.logits[row * a.stride + chosen]) : 0.0f);
}

}  // namespace

extern "C" int dsv4_router(const float* logits, const float* bias, const int64_t* tid2eid, const int64_t* tokens,
                           int64_t* ids, float* weights, int64_t rows, int experts, int64_t stride, int topk,
                           int64_t vocabulary, float route_scale, cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    if (experts > 1024) return cudaErrorInvalidValue;
    const Arguments args = {logits, bias, tid2eid, tokens, ids, weights, experts, topk, stride, vocabulary, route_scale};
    if (tid2eid != nullptr) return launch_dependent(router_hash, rows, 1, 32, 0, stream, args);
    auto kernel = experts <= 256 ? router<8> : experts <= 384 ? router<12> : router<32>;
    return launch_dependent(kernel, rows, 1, THREADS, 0, stream, args);
}
