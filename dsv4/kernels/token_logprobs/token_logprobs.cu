// token_logprobs: a cluster of 8 blocks per row holds its logits, less the largest, in shared memory.
#include <dsv4/dependent.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/reduce.cuh>
#include <dsv4/select.cuh>

using namespace dsv4;
using namespace dsv4::select;

namespace {

constexpr int W = 4, WARPS = THREADS / 32;
constexpr int MOST = 1024;  // of `top`: what one block sorts
constexpr uint32_t ANY = 0x7fffffffu;

// One value of every block, in rank order, and what a block is about to tell.
struct Exchange {
    float floats[2];
    uint64_t counts[2];
    int taken;       // places of the list that this block has given away
    int tied[WARPS];
    float parts[WARPS], others[WARPS];
};

__device__ float block_max(float x, float* parts) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    for (int warp = 0; warp < WARPS; ++warp) x = fmaxf(x, parts[warp]);
    return x;
}

__device__ float block_total(float x, float* parts) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < WARPS; ++warp) sum += parts[warp];
    return sum;
}

// How many threads before this one, and how many in all, say yes.
__device__ int2 places(bool yes, int* warps) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned votes = __ballot_sync(ALL, yes);
    __syncthreads();
    if (lane == 0) warps[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << lane) - 1)), all = 0;
    for (int w = 0; w < WARPS; ++w) {
        before += w < warp ? warps[w] : 0;
        all += warps[w];
    }
    return make_int2(before, all);
}

// list[0 .. size) rising; size is a power of two.
__device__ void sort(uint64_t* list, int size) {
    for (int span = 2; span <= size; span *= 2)
        for (int step = span / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < size / 2; i += THREADS) {
                const int a = 2 * i - (i & (step - 1)), b = a + step;
                const uint64_t x = list[a], y = list[b];
                if ((x > y) == ((a & span) == 0)) list[a] = y, list[b] = x;
            }
        }
    __syncthreads();
}

__global__ void __launch_bounds__(THREADS, 2) token_logprobs(const float* logits, const int64_t* tokens, float* logprob,
                                                             int64_t* rank, float* values, int64_t* ids, int64_t stride,
                                                             int vocab, int top, bool wide) {
    extern __shared__ float scores[];  // [slice_width(V)]
    __shared__ Histogram histogram;
    __shared__ Exchange mine;
    __shared__ uint64_t list[MOST];
    take_turn();
    const int64_t row = blockIdx.x / CLUSTER, token = tokens[row];
    const int block = cluster_rank(), width = slice_width(vocab), begin = min(block * width, vocab);
    const int count = min(width, vocab - begin);
    logits += row * stride;

    float largest = -INFINITY, poison = 0.0f;
    for (int i = threadIdx.x * W; i < count; i += THREADS * W) {
        float v[W];
        load<W>(logits + begin + i, v, count - i, wide);
#pragma unroll
        for (int k = 0; k < W; ++k)
            if (i + k < count) {
                scores[i + k] = v[k];
                largest = fmaxf(largest, v[k]);
                poison += v[k] != v[k] ? 1.0f : 0.0f;
            }
    }
    largest = block_max(largest, mine.parts);
    poison = block_total(poison, mine.others);
    if (threadIdx.x == 0) mine.floats[0] = largest, mine.floats[1] = poison;
    cluster_barrier();
    for (int peer = 0; peer < CLUSTER; ++peer) {
        largest = fmaxf(largest, peer_value(&mine.floats[0], peer));
        poison += peer_value(&mine.floats[1], peer);
    }
    cluster_barrier();
    if (poison > 0.0f || !(fabsf(largest) < INFINITY)) {  // nothing of such a row has a meaning
        if (block != 0) return;
        if (threadIdx.x == 0) logprob[row] = NAN, rank[row] = 1;
        for (int i = threadIdx.x; i < top; i += THREADS) values[row * top + i] = NAN, ids[row * top + i] = i;
        return;
    }

    float sum = 0.0f, lowest = INFINITY;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const float score = scores[i] - largest;
        scores[i] = score;
        sum += expf(score);
        if (score > -INFINITY) lowest = fminf(lowest, score);
    }
    sum = block_total(sum, mine.parts);
    lowest = -block_max(-lowest, mine.others);
    if (threadIdx.x == 0) mine.floats[0] = sum, mine.floats[1] = lowest;
    cluster_barrier();
    sum = 0.0f;
    for (int peer = 0; peer < CLUSTER; ++peer) {
        sum += peer_value(&mine.floats[0], peer);
        lowest = fminf(lowest, peer_value(&mine.floats[1], peer));
    }
    cluster_barrier();
    const float log_sum = logf(sum);
    const bool exists = token >= 0 && token < vocab;
    const float chosen = exists ? logits[token] - largest - log_sum : NAN;

    const uint32_t last = top == 0 ? 0 : threshold<false>(histogram, scores, count, ANY, spread_of(lowest), top, 0.0f);
    int better = 0, above = 0, tied = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const uint32_t key = key_of(scores[i]);
        better += scores[i] - log_sum > chosen;
        above += key < last;
        tied += key == last;
    }
    better = __reduce_add_sync(ALL, better), above = __reduce_add_sync(ALL, above), tied = __reduce_add_sync(ALL, tied);
    if (threadIdx.x == 0) mine.counts[0] = mine.counts[1] = 0, mine.taken = 0;
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(&mine.counts[0]), better);
        atomicAdd(reinterpret_cast<unsigned long long*>(&mine.counts[1]), static_cast<uint64_t>(above) << 32 | tied);
    }
    cluster_barrier();
    uint64_t rivals = 0, ahead = 0, all = 0;  // above and tied: in the slices before this one, in all
    for (int peer = 0; peer < CLUSTER; ++peer) {
        const uint64_t theirs = peer_value(&mine.counts[1], peer);
        rivals += peer_value(&mine.counts[0], peer);
        ahead += peer < block ? theirs : 0;
        all += theirs;
    }
    if (block == 0 && threadIdx.x == 0) logprob[row] = chosen, rank[row] = rivals + 1;
    if (top > 0) {
        // All that are above, then the first of those tied with the last place: each block knows its places in the list.
        const int ties = top - static_cast<int>(all >> 32);
        const int ties_ahead = min(static_cast<int>(static_cast<uint32_t>(ahead)), ties);
        const int quota = min(static_cast<int>(static_cast<uint32_t>(mine.counts[1])), ties - ties_ahead);
        const int place = static_cast<int>(ahead >> 32) + ties_ahead;
        int given = 0;
        for (int base = 0; base < count; base += THREADS) {
            const int i = base + threadIdx.x;
            const uint32_t key = i < count ? key_of(scores[i]) : ANY;
            if (key < last && i < count) {
                const uint64_t entry = static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(begin + i);
                put_peer_value(&list[place + quota + atomicAdd(&mine.taken, 1)], 0, entry);
            }
            if (given < quota) {
                const bool tie = i < count && key == last;
                const int2 where = places(tie, mine.tied);
                if (tie && given + where.x < quota) {
                    const uint64_t entry = static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(begin + i);
                    put_peer_value(&list[place + given + where.x], 0, entry);
                }
                given += where.y;
            }
        }
        if (block == 0) {
            int size = 2;
            while (size < top) size *= 2;
            for (int i = top + threadIdx.x; i < size; i += THREADS) list[i] = ~uint64_t{0};
            cluster_barrier();
            sort(list, size);
            for (int i = threadIdx.x; i < top; i += THREADS) {
                values[row * top + i] = score_of(static_cast<uint32_t>(list[i] >> 32)) - log_sum;
                ids[row * top + i] = static_cast<uint32_t>(list[i]);
            }
            return;
        }
    }
    cluster_barrier();
}

}  // namespace

extern "C" int dsv4_token_logprobs(const float* logits, const int64_t* tokens, float* logprob, int64_t* rank,
                                   float* values, int64_t* ids, int64_t rows, int64_t stride, int vocab, int top,
                                   cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    const int bytes = slice_width(vocab) * sizeof(float);
    const cudaError_t error =
        cudaFuncSetAttribute(token_logprobs, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    const bool wide = vocab % W == 0 && stride % W == 0 && aligned16(logits);
    return launch_dependent_clusters(token_logprobs, rows * CLUSTER, THREADS, bytes, CLUSTER, stream, logits, tokens,
                                     logprob, rank, values, ids, stride, vocab, top, wide);
}
