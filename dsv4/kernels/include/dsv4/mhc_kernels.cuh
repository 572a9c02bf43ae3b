// The kernels of mhc.cuh: for a few tokens one launch, whose blocks tell each other their shares of the sums, and where a
// site is left for more of them as well (mhc_together.cuh); for many a second one, of one block per token. A row's bits are
// the same either way.
#pragma once
#include <dsv4/dependent.cuh>
#include <dsv4/mhc_together.cuh>

namespace dsv4::mhc {

// A few tokens: block (slice, TT tokens).
template <Kind KIND, int TT, typename T>
__device__ void enter_few(const Args<T>& a, Words<KIND>& words) {
    using S = Shape<KIND>;
    __shared__ float parts[TT][S::WARPS][S::SHARE + 1], totals[TT][S::WORDS * exchange::PER_WORD];
    __shared__ __align__(16) float streams[TT][M][COLUMNS];
    const Place p(blockIdx.x, a.D, a.wide);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = blockIdx.x, slices = gridDim.x;
    const int first = blockIdx.y * TT, count = min(TT, static_cast<int>(a.tokens) - first);
    const int d = slice * COLUMNS + lane * W, left = lane < QUADS ? a.D - d : 0;  // of the first warps, at the end
    const bool wide = a.wide && left > 0;

    let_next_start();
    float f[S::SHARE][W];
    load_rows<KIND>(a, p, f);
    const float scale = scale_of<KIND>(a, lane), base = a.base[row_of<KIND>(lane)];
    if (KIND != SEAM && warp < S::WORDS)  // once a step: nobody has used them for long
        for (int t = 0; t < count; ++t) {
            ask_for(&words.turns[first + t]);
            for (int i = lane; i < slices; i += 32) ask_for(&words.sums[first + t][warp][i]);
        }
    wait_for_previous();

    uint32_t turns[TT] = {};
#pragma unroll
    for (int t = 0; t < TT; ++t)
        if (t < count) turns[t] = exchange::last_turn(&words.turns[first + t]) + 1;
    load_streams<KIND, TT>(a, p, first, count, streams);
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TT; ++t)
        if (t < count) part_of_sums<KIND>(f, p, streams[t], parts[t][warp]);
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TT; ++t)
        if (t < count && warp == t && lane < S::WORDS) {
            float values[exchange::PER_WORD];
            shares_of_word<KIND>(parts[t], lane, values);
            exchange::tell(&words.sums[first + t][lane][slice], values, turns[t]);
        }
    float weight[W];
    if constexpr (KIND == SEAM)
        if (warp < TT) load<W>(a.weight + d, weight, left, wide);
    if (warp < S::WORDS) {
        WordOfSlices all[TT];
#pragma unroll
        for (int t = 0; t < TT; ++t)
            all[t] = {t < count, warp, turns[t], words.sums[first + t][warp], totals[t]};
        hear_slices<MOST_SLICES / 32>(all, slices);
    }
    __syncthreads();
    // Every block of these tokens has read the numbers of the turn: this one has heard of all. By idle warps.
    if (slice == 0) {
#pragma unroll
        for (int t = 0; t < TT; ++t)
            if (t < count && threadIdx.x == 128 + t) words.turns[first + t] = turns[t];
        const int t = static_cast<int>(threadIdx.x) - 160;
        if (S::LEAVES && a.peers.any() && t >= 0 && t < count)
            a.peers.turns[first + t] = exchange::last_turn(a.peers.turns + first + t) + 1;
    }
    const bool ends = S::ENTERS && slice == slices - 1;  // and finishes the mixes, in warps of their own
    if (warp >= count && !(ends && warp >= TT && warp < TT + count)) return;
    const int t = warp % TT;
    const int64_t token = first + t;
    const float z = mix<KIND>(a, totals[t], scale, base);
    if constexpr (S::ENTERS) {
        if (warp >= TT) {
            finish_mixes(a, token, z);
            return;
        }
    }
    collapse<KIND>(a, token, z, totals[t], streams[t], weight, d, left, wide);
}

// Many tokens, the first launch: block (slice, every gridDim.y-th group of TT tokens).
template <Kind KIND, int TT, typename T>
__device__ void shares_of_many(const Args<T>& a) {
    using S = Shape<KIND>;
    __shared__ float parts[TT][S::WARPS][S::SHARE + 1];
    __shared__ __align__(16) float streams[TT][M][COLUMNS];
    static_assert(TT * S::WORDS <= S::WORKERS);
    const Place p(blockIdx.x, a.D, a.wide);
    const int warp = threadIdx.x / 32;
    let_next_start();
    float f[S::SHARE][W];
    load_rows<KIND>(a, p, f);
    wait_for_previous();
    const int64_t begin = static_cast<int64_t>(blockIdx.y) * TT, step = static_cast<int64_t>(gridDim.y) * TT;
    for (int64_t first = begin; first < a.tokens; first += step) {
        const int count = min(static_cast<int64_t>(TT), a.tokens - first);
        load_streams<KIND, TT>(a, p, first, count, streams);
        __syncthreads();
#pragma unroll 2
        for (int t = 0; t < count; ++t) part_of_sums<KIND>(f, p, streams[t], parts[t][warp]);
        __syncthreads();  // the streams may be overwritten
        const int t = threadIdx.x / S::WORDS, word = threadIdx.x % S::WORDS;
        if (t < count) {
            float values[exchange::PER_WORD];
            shares_of_word<KIND>(parts[t], word, values);
            a.shares[((first + t) * S::WORDS + word) * gridDim.x + blockIdx.x] =
                make_float4(values[0], values[1], values[2], 0.0f);
        }
    }
}

// Many tokens, the second launch: a block per token, S::THREADS threads, so many of them on a processor.
template <typename T>
constexpr int ENDS = sizeof(T) == 2 ? 2 : 1;

template <Kind KIND, typename T>
__device__ void enter_many(const Args<T>& a, int slices) {
    using S = Shape<KIND>;
    constexpr int N = wide_elements<T>, ROUNDS = MOST_COLUMNS / S::WORKERS / N;
    __shared__ float totals[S::WORDS * exchange::PER_WORD], mixes[S::ROWS], pre[M], norm;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t token = blockIdx.x;
    const T* h = S::LEAVES ? a.h_out : a.h;
    union Raw {
        uint4 chunk;
        T element[N];
    } streams[ROUNDS][M];
    take_turn();
    if (warp < S::WARPS) {
        float sums[4] = {};
        if (warp < S::WORDS) {
#pragma unroll
            for (int i = 0; i < MOST_SLICES / 32; ++i)
                if (lane + 32 * i < slices) {
                    const float4 word = a.shares[(token * S::WORDS + warp) * slices + lane + 32 * i];
                    sums[0] += word.x, sums[1] += word.y, sums[2] += word.z;
                }
        }
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {  // while the sums are made
            const int d = (round * S::WORKERS + threadIdx.x) * N, left = a.D - d;
#pragma unroll
            for (int j = 0; j < M; ++j) {
                const T* from = h + (token * M + j) * a.D + d;
                if (a.wide && left > 0)
                    streams[round][j].chunk = *reinterpret_cast<const uint4*>(from);
                else
#pragma unroll
                    for (int i = 0; i < N; ++i)
                        streams[round][j].element[i] = i < left ? from[i] : from_float<T>(0.0f);
            }
        }
        if (warp < S::WORDS) total_of_word(sums, warp, totals);
    }
    __syncthreads();
    if (warp == 0) {
        const float z = mix<KIND>(a, totals, scale_of<KIND>(a, lane), a.base[row_of<KIND>(lane)]);
        const float gain = sigmoid(z) + a.hc_eps;
        if (lane < S::ROWS) mixes[lane] = z;
        if (lane < M) pre[lane] = gain;
        if constexpr (KIND == SEAM) {
            float gains[M];
#pragma unroll
            for (int j = 0; j < M; ++j) gains[j] = __shfl_sync(ALL, gain, j);
            norm = norm_factor(a, totals, gains);
        }
    }
    __syncthreads();
    if constexpr (S::ENTERS) {
        if (warp == S::WARPS) {
            finish_mixes(a, token, mixes[row_of<KIND>(lane)]);
            return;
        }
    }
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int d = (round * S::WORKERS + threadIdx.x) * N, left = a.D - d;
        if (left <= 0) break;
        float x[N];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < M; ++j) sum = fmaf(pre[j], to_float(streams[round][j].element[k]), sum);
            x[k] = rounded<T>(sum);
        }
        if constexpr (KIND == SEAM) {
            float w[N];
            load<N>(a.weight + d, w, left, a.wide);
#pragma unroll
            for (int k = 0; k < N; ++k) x[k] = x[k] * norm * w[k];
        }
        store<N>(a.x_out + token * a.D + d, x, left, a.wide);
    }
}

// One launch where its blocks all run at once, else two.
template <Kind KIND, typename T>
static cudaError_t run(const Kernels<T>& kernels, Args<T> args, cudaStream_t stream) {
    using S = Shape<KIND>;
    args.mean = 1.0f / static_cast<float>(args.D);
    if (args.D > MOST_COLUMNS || args.peers.size > MOST_RANKS)
        return cudaErrorInvalidValue;
    const int slices = (args.D + COLUMNS - 1) / COLUMNS;
    int device = 0, processors = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
        return error;
    const int64_t pairs = (args.tokens + 1) / 2, at_once = 2 * processors / slices;  // two blocks fit on a processor
    if (args.tokens <= FEW && args.tokens * slices <= processors)
        return launch_dependent(kernels.one, slices, args.tokens, S::WORKERS, 0, stream, args);
    if (args.tokens <= FEW && pairs <= at_once)
        return launch_dependent(kernels.two, slices, pairs, S::WORKERS, 0, stream, args);
    if constexpr (S::LEAVES) {
        bool fits = false;
        const cudaError_t error = run_together<KIND>(kernels, args, slices, device, processors, stream, fits);
        if (fits || error != cudaSuccess) return error;
        if (args.peers.size > 1) return cudaErrorCooperativeLaunchTooLarge;  // or too many columns
    }
    const int together = args.tokens <= 32 ? S::SOME : 2 * S::SOME;  // fn is read once for so many
    const int64_t groups = (args.tokens + together - 1) / together;
    const auto first = together == S::SOME ? kernels.some : kernels.many;
    const cudaError_t error = launch_dependent(first, slices, groups, S::WORKERS, 0, stream, args);
    if (error != cudaSuccess) return error;
    return launch_dependent(kernels.end, args.tokens, 1, S::THREADS, 0, stream, args, slices);
}

}  // namespace dsv4::mhc
