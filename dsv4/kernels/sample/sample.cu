// sample: a cluster of 8 blocks per row. Each block reads its slice once; what is drawn from stays in shared memory.
#include <dsv4/dependent.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/select.cuh>

using namespace dsv4;
using namespace dsv4::select;

namespace {

constexpr int W = 4, BATCH = 8, WARPS = THREADS / 32;
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;
constexpr float LEAST_NOISE = -2.82f, MOST_NOISE = 22.9f;  // -log E for E in [2^-33, 24 ln 2]

struct Args {
    const float *logits, *temperature;
    const int64_t *seed, *counter, *top_k;
    const float *top_p, *min_p, *bias;
    const bool *biased, *in_prompt;
    const int* counts;
    const float *repetition, *presence, *frequency;
    const int64_t *stops, *until;
    int64_t* tokens;
    int64_t stride;
    int vocab, stop_count;
    bool wide;
};

// Larger float, larger key; -0 equals +0.
__device__ __forceinline__ uint32_t order(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unorder(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
// The larger value, of equal ones the lower id.
__device__ __forceinline__ uint64_t candidate(float value, int id) {
    return static_cast<uint64_t>(order(value)) << 32 | (ALL - static_cast<uint32_t>(id));
}
__device__ __forceinline__ int id_of(uint64_t best) { return static_cast<int>(ALL - static_cast<uint32_t>(best)); }

__device__ __forceinline__ uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// What is known of a part of the row: `low`, `high` of the logits as they came, `poison` 0 or NaN; then the best
// candidate and the lowest finite value after bias and penalties.
struct Part {
    uint64_t best;
    float low, high, lowest, poison;

    __device__ void join(const Part& other) {
        best = other.best > best ? other.best : best;
        low = fminf(low, other.low);
        high = fmaxf(high, other.high);
        lowest = fminf(lowest, other.lowest);
        poison += other.poison;
    }
    template <int FROM>
    __device__ void join_lanes() {
#pragma unroll
        for (int step = FROM; step > 0; step /= 2) {
            Part other;
            other.best = __shfl_xor_sync(ALL, best, step);
            other.low = __shfl_xor_sync(ALL, low, step);
            other.high = __shfl_xor_sync(ALL, high, step);
            other.lowest = __shfl_xor_sync(ALL, lowest, step);
            other.poison = __shfl_xor_sync(ALL, poison, step);
            join(other);
        }
    }
};

// The join over all threads of the cluster, in every thread. A block may leave after it.
__device__ Part join_cluster(Part part) {
    __shared__ Part warps[WARPS];
    __shared__ Part block, row;
    part.join_lanes<16>();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = part;
    __syncthreads();
    if (threadIdx.x < 32) {
        part = warps[threadIdx.x % WARPS];
        part.join_lanes<WARPS / 2>();
        if (threadIdx.x == 0) block = part;
    }
    cluster_barrier();
    if (threadIdx.x < 32) {
        const int rank = threadIdx.x % CLUSTER;
        part.best = peer_value(&block.best, rank);
        part.low = peer_value(&block.low, rank);
        part.high = peer_value(&block.high, rank);
        part.lowest = peer_value(&block.lowest, rank);
        part.poison = peer_value(&block.poison, rank);
        part.join_lanes<CLUSTER / 2>();
        if (threadIdx.x == 0) row = part;
    }
    cluster_barrier();
    return row;
}

// Bias, forbidden tokens and penalties, each only where the row asks for it.
struct Rules {
    const float* bias = nullptr;
    const bool* in_prompt = nullptr;
    const int* counts = nullptr;
    const int64_t* stops = nullptr;
    float repetition, presence, frequency;

    __device__ Rules(const Args& a, int64_t row) {  // all that is read of the row is asked for before any is waited for
        const bool rated = a.counts != nullptr, early = a.stops != nullptr, some = a.biased != nullptr;
        const int64_t counter = early ? a.counter[row] : 0, until = early ? a.until[row] : 0;
        repetition = rated ? a.repetition[row] : 1.0f;
        presence = rated ? a.presence[row] : 0.0f, frequency = rated ? a.frequency[row] : 0.0f;
        const bool wanted = some ? a.biased[row] : a.bias != nullptr;
        if (a.bias != nullptr && wanted) bias = a.bias + row * a.vocab;
        if (counter < until) stops = a.stops + row * a.stop_count;
        if (!rated || (repetition == 1.0f && presence == 0.0f && frequency == 0.0f)) return;
        in_prompt = a.in_prompt + row * a.vocab;
        counts = a.counts + row * a.vocab;
    }
    __device__ bool any() const { return bias != nullptr || counts != nullptr || stops != nullptr; }

    __device__ float apply(float x, int id, int stop_count) const {  // roundings as the twin's: no fused multiply-add
        if (bias != nullptr) x = __fadd_rn(x, bias[id]);
        if (stops != nullptr)
            for (int i = 0; i < stop_count; ++i)
                if (stops[i] == id) x = -INFINITY;
        if (counts != nullptr) {
            const int count = counts[id];
            const float factor = count > 0 || in_prompt[id] ? repetition : 1.0f;
            x = x > 0.0f ? __fdiv_rn(x, factor) : __fmul_rn(x, factor);
            x = __fsub_rn(x, __fmul_rn(frequency, static_cast<float>(count)));
            x = __fsub_rn(x, __fmul_rn(presence, count > 0 ? 1.0f : 0.0f));
        }
        return x;
    }
};

// The Gumbel maximum over the slice's scores that stay. Noise is at least LEAST_NOISE and the best score, 0, stays: so
// the winner is no lower than that, and u <= E = -log1p(-u) tells without a logarithm nearly always who cannot win.
__device__ uint64_t draw(const float* scores, int begin, int count, float lowest, int64_t seed, int64_t counter) {
    const uint64_t key = mix(mix(static_cast<uint64_t>(seed) + GOLDEN) + static_cast<uint64_t>(counter + 1) * GOLDEN);
    uint64_t best = 0;
    float bound = LEAST_NOISE;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const float score = scores[i];
        if (score < lowest || score < bound - MOST_NOISE) continue;
        const uint64_t hash = mix(key + static_cast<uint64_t>(begin + i + 1) * GOLDEN);
        const float u = fminf((__uint2float_rn(static_cast<uint32_t>(hash >> 32)) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
        if (u > __expf(score - bound + 0.01f)) continue;
        const float value = score - logf(-log1pf(-u));
        const uint64_t mine = candidate(value, begin + i);
        best = mine > best ? mine : best;
        bound = fmaxf(bound, value);
    }
    return best;
}

// By one thread each: they were last read a step ago.
__device__ __forceinline__ void ask_for_parameters(const Args& a, int64_t row) {
    const void* const found[] = {a.temperature + row, a.seed + row, a.counter + row,
                                 a.top_k == nullptr ? nullptr : a.top_k + row, a.top_p == nullptr ? nullptr : a.top_p + row,
                                 a.min_p == nullptr ? nullptr : a.min_p + row,
                                 a.biased == nullptr ? nullptr : a.biased + row,
                                 a.until == nullptr ? nullptr : a.until + row,
                                 a.repetition == nullptr ? nullptr : a.repetition + row,
                                 a.presence == nullptr ? nullptr : a.presence + row,
                                 a.frequency == nullptr ? nullptr : a.frequency + row};
    if (threadIdx.x > 0) return;
#pragma unroll
    for (const void* line : found)
        if (line != nullptr) ask_for(line);
}

__global__ void __launch_bounds__(THREADS, 2) sample(Args a) {
    extern __shared__ float scores[];  // [slice_width(V)]
    __shared__ Histogram histogram;
    const int64_t row = blockIdx.x / CLUSTER;
    let_next_start();
    ask_for_parameters(a, row);
    wait_for_previous();
    const int width = slice_width(a.vocab), begin = min(cluster_rank() * width, a.vocab);
    const int count = min(width, a.vocab - begin);
    const float* logits = a.logits + row * a.stride + begin;
    float v[BATCH][W];
    const auto fetch = [&](int base) {
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const int i = base + j * THREADS * W;
            load<W>(logits + i, v[j], count - i, a.wide && i < count);
        }
    };
    fetch(threadIdx.x * W);
    const float temperature = a.temperature[row];
    const bool drawn = temperature > 0.0f;
    const Rules rules(a, row);
    const bool changed = rules.any();

    Part part = {0, INFINITY, -INFINITY, INFINITY, 0.0f};
    float best = -INFINITY;
    int at = threadIdx.x * W;
    const auto meet = [&](float x, int i) {
        if (x > best) best = x, at = i;
    };
    for (int base = threadIdx.x * W; base < count; base += THREADS * W * BATCH) {
        if (base != threadIdx.x * W) fetch(base);
#pragma unroll
        for (int j = 0; j < BATCH; ++j)
#pragma unroll
            for (int k = 0; k < W; ++k) {
                const int i = base + j * THREADS * W + k;
                if (i >= count) continue;
                const float x = v[j][k];
                part.low = fminf(part.low, x);
                part.high = fmaxf(part.high, x);
                part.poison = fmaf(x, 0.0f, part.poison);  // NaN and infinities give NaN
                meet(x, i);
                if (drawn || changed) scores[i] = x;
            }
    }
    if (changed) {  // apart, so that the others need not jump over it: each thread what it wrote, in rising order
        best = -INFINITY, at = threadIdx.x * W;
#pragma unroll 1
        for (int base = threadIdx.x * W; base < count; base += THREADS * W)
#pragma unroll 1
            for (int i = base; i < min(base + W, count); ++i) {
                const float x = rules.apply(scores[i], begin + i, a.stop_count);
                if (x > -INFINITY) part.lowest = fminf(part.lowest, x);
                meet(x, i);
                scores[i] = x;
            }
    }
    if (threadIdx.x * W < count) part.best = candidate(best, begin + at);
    if (!changed) part.lowest = part.low;
    part = join_cluster(part);

    int64_t token = id_of(part.best);
    const float top = unorder(static_cast<uint32_t>(part.best >> 32));
    if (part.poison != 0.0f || !(part.high - part.low < INFINITY)) {
        token = -1;
    } else if (drawn && fabsf(top) < INFINITY) {  // without a finite best, as when all are forbidden, nothing is drawn
        for (int i = threadIdx.x; i < count; i += THREADS) scores[i] = (scores[i] - top) / temperature;
        const int64_t top_k = a.top_k == nullptr ? 0 : a.top_k[row];
        const float top_p = a.top_p == nullptr ? 1.0f : a.top_p[row];
        const float spread = spread_of((part.lowest - top) / temperature);
        uint32_t limit = FORBIDDEN;  // each thread rereads what it wrote; threshold() begins with a barrier
        if (top_k > 0 && top_k < a.vocab) limit = threshold<false>(histogram, scores, count, limit, spread, top_k, 0.0f);
        if (top_p < 1.0f) limit = threshold<true>(histogram, scores, count, limit, spread, 0, fmaxf(top_p, 0x1p-40f));
        const float lowest = fmaxf(score_of(limit), a.min_p == nullptr ? -INFINITY : logf(a.min_p[row]));
        part.best = draw(scores, begin, count, lowest, a.seed[row], a.counter[row]);
        token = id_of(join_cluster(part).best);
    }
    if (cluster_rank() == 0 && threadIdx.x == 0) a.tokens[row] = token;
}

}  // namespace

extern "C" int dsv4_sample(const float* logits, const float* temperature, const int64_t* seed, const int64_t* counter,
                           const int64_t* top_k, const float* top_p, const float* min_p, const float* bias,
                           const bool* biased, const bool* in_prompt, const int* counts, const float* repetition,
                           const float* presence, const float* frequency, const int64_t* stops, const int64_t* until,
                           int64_t* tokens, int64_t rows, int64_t stride, int vocab, int stop_count,
                           cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    const int bytes = slice_width(vocab) * sizeof(float);
    const cudaError_t error = cudaFuncSetAttribute(sample, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    const bool wide = vocab % W == 0 && stride % W == 0 && aligned16(logits);
    const Args args = {logits, temperature, seed,       counter,  top_k,     top_p, min_p, bias,   biased, in_prompt,
                       counts, repetition,  presence,   frequency, stops,    until, tokens, stride, vocab,  stop_count,
                       wide};
    return launch_dependent_clusters(sample, rows * CLUSTER, THREADS, bytes, CLUSTER, stream, args);
}
