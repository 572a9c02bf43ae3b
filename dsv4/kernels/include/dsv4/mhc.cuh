// Entering an mHC site (PRE), leaving one on the way (SEAM), or the head's collapse (HEAD).
//
// A block takes 64 columns, in all M streams, of TT tokens: its share of a token's ROWS products with fn and of the sum
// of squares. A token's shares are added up always in the same order, and then: mixes, collapse, norm; Sinkhorn beside
// them, in one thread. For a few tokens that is one launch, in which the blocks of a token tell each other their shares
// and each goes on with its own columns (exchange.cuh); for many there is a second launch, one block per token. A row's
// bits are the same either way.
#pragma once
#include <dsv4/dependent.cuh>
#include <dsv4/exchange.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/reduce.cuh>

namespace dsv4::mhc {

enum Kind { PRE, SEAM, HEAD };

constexpr int M = 4;  // hc_mult of Flash and Pro
constexpr int W = 4;  // columns per thread while the sums are made
constexpr int COLUMNS = 64, PLACES = M * COLUMNS / W, QUADS = COLUMNS / W;
constexpr int FEW = 4, MOST_SLICES = 128, MOST_COLUMNS = MOST_SLICES * COLUMNS;
constexpr unsigned ALL = 0xffffffffu;
static_assert(PLACES == 64 && QUADS == 16, "two warps hold a team's places, half a warp a slice's columns");

template <Kind KIND>
struct Shape {
    static constexpr int ROWS = KIND == HEAD ? M : (2 + M) * M;  // pre | post | comb
    static constexpr int SUMS = ROWS + 1;                        // and the sum of squares
    static constexpr int TEAM = KIND == HEAD ? 4 : 8;            // of 64 threads, each with
    static constexpr int SHARE = ROWS / TEAM;                    // so many rows of fn
    static constexpr int WORKERS = TEAM * PLACES, WARPS = WORKERS / 32;
    static constexpr int THREADS = WORKERS + (KIND == HEAD ? 0 : 32);  // of the second launch: and a warp for Sinkhorn
    static_assert(SHARE * TEAM == ROWS && SHARE < 4 && SUMS <= 32);
};

template <typename T>
struct Args {
    const T *y, *h;                                     // y, post, comb, h_out, weight: SEAM
    const float *post, *comb, *fn, *base, *scale, *weight;  // scale: of each row, but one for all in HEAD
    T *h_out, *x_out;
    float *post_out, *comb_out, *shares;  // shares [T, slices, SUMS]: of the two launches
    int64_t tokens, y_stride;
    int D, iters;
    float hc_eps, norm_eps;
    bool wide;
};

// What the blocks of one launch tell each other. One per op and device.
template <Kind KIND>
struct Words {
    uint64_t sums[FEW][MOST_SLICES][Shape<KIND>::SUMS];
    uint64_t squares[FEW][MOST_SLICES];
    uint32_t turns[FEW];
};

// A thread's columns while the sums are made: W of one stream.
struct Place {
    int team, stream, column, d, left;  // column: of the block's 64
    bool wide;
    __device__ Place(int D, bool all_wide) {
        const int place = threadIdx.x % PLACES;
        team = threadIdx.x / PLACES, stream = place / QUADS, column = place % QUADS * W;
        d = blockIdx.x * COLUMNS + column, left = D - d;
        wide = all_wide && left > 0;
    }
};

// One thread's 4 x 4. A row or column is multiplied by the inverse of its sum, two of which come from one reciprocal:
// three roundings more, which the next step corrects, in place of divisions.
__device__ __forceinline__ void inverses(float& a, float& b) {
    float both;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(both) : "f"(a * b));
    const float first = both * b;
    b = both * a, a = first;
}
__device__ __forceinline__ void scale_rows(float (&c)[M][M], float eps) {
    float sums[M];
#pragma unroll
    for (int j = 0; j < M; ++j) sums[j] = (c[j][0] + c[j][1]) + (c[j][2] + c[j][3]) + eps;
    inverses(sums[0], sums[1]), inverses(sums[2], sums[3]);
#pragma unroll
    for (int i = 0; i < M * M; ++i) c[i / M][i % M] *= sums[i / M];
}
__device__ __forceinline__ void scale_columns(float (&c)[M][M], float eps) {
    float sums[M];
#pragma unroll
    for (int k = 0; k < M; ++k) sums[k] = (c[0][k] + c[1][k]) + (c[2][k] + c[3][k]) + eps;
    inverses(sums[0], sums[1]), inverses(sums[2], sums[3]);
#pragma unroll
    for (int i = 0; i < M * M; ++i) c[i / M][i % M] *= sums[i % M];
}
__device__ __forceinline__ void sinkhorn(float (&c)[M][M], int iters, float eps) {
#pragma unroll
    for (int j = 0; j < M; ++j) {
        const float top = fmaxf(fmaxf(c[j][0], c[j][1]), fmaxf(c[j][2], c[j][3]));
#pragma unroll
        for (int k = 0; k < M; ++k) c[j][k] = expf(c[j][k] - top);
    }
    scale_rows(c, 0.0f);
#pragma unroll
    for (int i = 0; i < M * M; ++i) c[i / M][i % M] += eps;
    scale_columns(c, eps);
#pragma unroll 1
    for (int i = 1; i < iters; ++i) {
        scale_rows(c, eps);
        scale_columns(c, eps);
    }
}

// Four sums over a warp in six exchanges; lanes 8 i .. 8 i + 7 get that of sums[i].
__device__ __forceinline__ float four_sums(const float (&sums)[4]) {
    const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
    const float a = (upper ? sums[2] : sums[0]) + __shfl_xor_sync(ALL, upper ? sums[0] : sums[2], 16);
    const float b = (upper ? sums[3] : sums[1]) + __shfl_xor_sync(ALL, upper ? sums[1] : sums[3], 16);
    float sum = (odd ? b : a) + __shfl_xor_sync(ALL, odd ? a : b, 8);
#pragma unroll
    for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    return sum;
}

// A thread's rows of fn.
template <Kind KIND, typename T>
__device__ __forceinline__ void load_rows(const Args<T>& a, const Place& p, float (&f)[Shape<KIND>::SHARE][W]) {
#pragma unroll
    for (int i = 0; i < Shape<KIND>::SHARE; ++i)
        load<W>(a.fn + (static_cast<int64_t>(p.team * Shape<KIND>::SHARE + i) * M + p.stream) * a.D + p.d, f[i], p.left,
                p.wide);
}

// A thread's columns of the site's streams. SEAM: h' = post y + comb^T h, rounded, and written by the first team.
template <Kind KIND, typename T>
__device__ __forceinline__ void load_streams(const Args<T>& a, const Place& p, int64_t token, bool there,
                                             float (&v)[W]) {
    if constexpr (KIND == SEAM) {
        float old[M][W], from[W];
        load<W>(a.y + token * a.y_stride + p.d, from, p.left, p.wide);
#pragma unroll
        for (int j = 0; j < M; ++j) load<W>(a.h + (token * M + j) * a.D + p.d, old[j], p.left, p.wide);
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = 0.0f;
#pragma unroll
        for (int j = 0; j < M; ++j) {
            const float mix = a.comb[(token * M + j) * M + p.stream];
#pragma unroll
            for (int k = 0; k < W; ++k) v[k] = fmaf(old[j][k], mix, v[k]);
        }
        const float gain = a.post[token * M + p.stream];
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = rounded<T>(fmaf(from[k], gain, v[k]));
        if (p.team == 0 && p.left > 0 && there) store<W>(a.h_out + (token * M + p.stream) * a.D + p.d, v, p.left, p.wide);
    } else {
        load<W>(a.h + (token * M + p.stream) * a.D + p.d, v, p.left, p.wide);
    }
}

// A warp's part of its team's sums: of SHARE rows, then of the squares.
template <Kind KIND>
__device__ __forceinline__ void part_of_sums(const float (&f)[Shape<KIND>::SHARE][W], const float (&v)[W],
                                             float (&part)[Shape<KIND>::SHARE + 1]) {
    constexpr int SHARE = Shape<KIND>::SHARE;
    float sums[4] = {};
#pragma unroll
    for (int k = 0; k < W; ++k) {
#pragma unroll
        for (int i = 0; i < SHARE; ++i) sums[i] = fmaf(f[i][k], v[k], sums[i]);
        sums[SHARE] = fmaf(v[k], v[k], sums[SHARE]);
    }
    const float sum = four_sums(sums);
    const int which = threadIdx.x % 32 / 8;
    if (threadIdx.x % 8 == 0 && which <= SHARE) part[which] = sum;
}

// The block's share of sum `lane`, from the parts [WARPS][stride][SHARE + 1] of its warps.
template <Kind KIND>
__device__ __forceinline__ float share(const float* parts, int stride, int lane) {
    using S = Shape<KIND>;
    const int from = lane / S::SHARE % S::TEAM * 2, row = lane == S::ROWS ? S::SHARE : lane % S::SHARE;
    const float* at = parts + from * stride * (S::SHARE + 1) + row;
    return at[0] + at[stride * (S::SHARE + 1)];  // of the squares, that of team 0
}

// (fn . v) * rsqrt(mean(v^2) + eps) * scale + base, where lane i holds sum i.
template <Kind KIND>
__device__ __forceinline__ float mix(float total, int D, float scale, float base, float eps) {
    const float square = __shfl_sync(ALL, total, Shape<KIND>::ROWS);
    const float root = rsqrtf(square / static_cast<float>(M * D) + eps);
    return fmaf(__fmul_rn(total, root), scale, base);
}

// The number of `lane`'s row in scale and base.
template <Kind KIND>
__device__ __forceinline__ int row_of(int lane) {
    return min(lane, Shape<KIND>::ROWS - 1);
}
template <Kind KIND, typename T>
__device__ __forceinline__ float scale_of(const Args<T>& a, int lane) {
    return a.scale[KIND == HEAD ? 0 : row_of<KIND>(lane)];
}

// post and comb of a token, by one warp whose lane i holds mix i.
template <typename T>
__device__ __forceinline__ void finish_mixes(const Args<T>& a, int64_t token, float z) {
    const int lane = threadIdx.x % 32;
    if (lane >= M && lane < 2 * M) a.post_out[token * M + lane - M] = 2.0f * sigmoid(z);
    float c[M][M];
#pragma unroll
    for (int i = 0; i < M * M; ++i) c[i / M][i % M] = __shfl_sync(ALL, z, 2 * M + i);
    if (lane != 0) return;
    sinkhorn(c, a.iters, a.hc_eps);
#pragma unroll
    for (int i = 0; i < M * M; ++i) a.comb_out[token * M * M + i] = c[i / M][i % M];
}

// x * scale * weight, where scale comes from the sums of squares of all slices; lane l has those of l, l + 32, ...
__device__ __forceinline__ float norm_scale(float squares, int D, float eps) {
    return rsqrtf(warp_sum(squares) / static_cast<float>(D) + eps);
}

// A few tokens: block (slice, token).
template <Kind KIND, typename T>
__device__ void enter_few(const Args<T>& a, Words<KIND>& words) {
    using S = Shape<KIND>;
    __shared__ float parts[S::WARPS][S::SHARE + 1], totals[S::WARPS][S::SUMS];
    __shared__ __align__(16) float streams[M][COLUMNS];
    const Place p(a.D, a.wide);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = blockIdx.x, slices = gridDim.x;
    const int64_t token = blockIdx.y;
    const int d = slice * COLUMNS + lane * W, left = lane < QUADS ? a.D - d : 0;  // of the first warp, at the end
    const bool wide = a.wide && left > 0;

    let_next_start();
    float f[S::SHARE][W], weight[W];
    load_rows<KIND>(a, p, f);
    if constexpr (KIND == SEAM)
        if (warp == 0) load<W>(a.weight + d, weight, left, wide);
    const float scale = scale_of<KIND>(a, lane), base = a.base[row_of<KIND>(lane)];
    wait_for_previous();

    const uint32_t turn = exchange::last_turn(&words.turns[token]) + 1;
    float v[W];
    load_streams<KIND>(a, p, token, true, v);
    if (p.team == 0)
        *reinterpret_cast<float4*>(&streams[p.stream][p.column]) = make_float4(v[0], v[1], v[2], v[3]);
    part_of_sums<KIND>(f, v, parts[warp]);
    __syncthreads();
    if (warp == 0 && lane < S::SUMS)
        exchange::tell(&words.sums[token][slice][lane], share<KIND>(parts[0], 1, lane), turn);
    if (lane < S::SUMS)
        totals[warp][lane] = exchange::hear_sum<MOST_SLICES / S::WARPS>(
            &words.sums[token][warp][lane], (slices - warp + S::WARPS - 1) / S::WARPS, S::WARPS * S::SUMS, turn);
    __syncthreads();
    // Every block of the token has read the number of the turn: this one has heard of all.
    if (slice == 0 && threadIdx.x == 0) words.turns[token] = turn;
    if (warp > 1 || (warp == 1 && (KIND == HEAD || slice != slices - 1))) return;
    float total = 0.0f;
    if (lane < S::SUMS)
#pragma unroll
        for (int i = 0; i < S::WARPS; ++i) total += totals[i][lane];
    const float z = mix<KIND>(total, a.D, scale, base, a.norm_eps);
    if constexpr (KIND != HEAD) {
        if (warp == 1) {
            finish_mixes(a, token, z);
            return;
        }
    }
    const float gain = sigmoid(z) + a.hc_eps;
    float pre[M], x[W], square = 0.0f;
#pragma unroll
    for (int j = 0; j < M; ++j) pre[j] = __shfl_sync(ALL, gain, j);
#pragma unroll
    for (int k = 0; k < W; ++k) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < M; ++j) sum = fmaf(pre[j], streams[j][lane % QUADS * W + k], sum);
        x[k] = rounded<T>(sum);
        square = fmaf(x[k], x[k], square);
    }
    if constexpr (KIND == SEAM) {
#pragma unroll
        for (int step = 1; step < QUADS; step *= 2) square += __shfl_xor_sync(ALL, square, step);
        if (lane == 0) exchange::tell(&words.squares[token][slice], square, turn);
        const float squares =
            exchange::hear_sum<MOST_SLICES / 32>(&words.squares[token][lane], (slices - lane + 31) / 32, 32, turn);
        const float factor = norm_scale(squares, a.D, a.norm_eps);
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] = x[k] * factor * weight[k];
    }
    if (left > 0) store<W>(a.x_out + token * a.D + d, x, left, wide);
}

// Many tokens, the first launch: block (slice, TT tokens).
template <Kind KIND, int TT, typename T>
__device__ void shares_of_many(const Args<T>& a) {
    using S = Shape<KIND>;
    __shared__ float parts[S::WARPS][TT][S::SHARE + 1];
    static_assert(TT <= S::WARPS);
    const Place p(a.D, a.wide);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * TT;
    let_next_start();
    float f[S::SHARE][W];
    load_rows<KIND>(a, p, f);
    wait_for_previous();
#pragma unroll
    for (int t = 0; t < TT; ++t) {
        float v[W];
        load_streams<KIND>(a, p, min(first + t, a.tokens - 1), first + t < a.tokens, v);
        part_of_sums<KIND>(f, v, parts[warp][t]);
    }
    __syncthreads();
    if (warp < TT && first + warp < a.tokens && lane < S::SUMS)
        a.shares[((first + warp) * gridDim.x + blockIdx.x) * S::SUMS + lane] = share<KIND>(parts[0][warp], TT, lane);
}

// Many tokens, the second launch: a block per token, S::THREADS threads, so many of them on a processor.
template <typename T>
constexpr int ENDS = sizeof(T) == 2 ? 2 : 1;

template <Kind KIND, typename T>
__device__ void enter_many(const Args<T>& a, int slices) {
    using S = Shape<KIND>;
    constexpr int N = wide_elements<T>, ROUNDS = MOST_COLUMNS / S::WORKERS / N;
    __shared__ float totals[S::WARPS][S::SUMS], mixes[S::ROWS], pre[M], squares[MOST_SLICES];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t token = blockIdx.x;
    const T* h = KIND == SEAM ? a.h_out : a.h;
    union Raw {
        uint4 chunk;
        T element[N];
    } streams[ROUNDS][M];
    take_turn();
    if (warp < S::WARPS) {
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
        if (lane < S::SUMS) {
            float sum = 0.0f;
#pragma unroll 4
            for (int slice = warp; slice < slices; slice += S::WARPS)
                sum += a.shares[(token * slices + slice) * S::SUMS + lane];
            totals[warp][lane] = sum;
        }
    }
    __syncthreads();
    if (warp == 0) {
        float total = 0.0f;
        if (lane < S::SUMS)
#pragma unroll
            for (int i = 0; i < S::WARPS; ++i) total += totals[i][lane];
        const float z = mix<KIND>(total, a.D, scale_of<KIND>(a, lane), a.base[row_of<KIND>(lane)], a.norm_eps);
        if (lane < S::ROWS) mixes[lane] = z;
        if (lane < M) pre[lane] = sigmoid(z) + a.hc_eps;
    }
    __syncthreads();
    if constexpr (KIND != HEAD) {
        if (warp == S::WARPS) {
            finish_mixes(a, token, mixes[row_of<KIND>(lane)]);
            return;
        }
    }
    float x[ROUNDS][N], squared[ROUNDS];
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        float quads[N / W] = {};
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < M; ++j) sum = fmaf(pre[j], to_float(streams[round][j].element[k]), sum);
            x[round][k] = rounded<T>(sum);
            quads[k / W] = fmaf(x[round][k], x[round][k], quads[k / W]);
        }
        squared[round] = N == W ? quads[0] : quads[0] + quads[N / W - 1];
    }
    float factor = 1.0f;
    if constexpr (KIND == SEAM) {
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            constexpr int LANES = COLUMNS / N;  // that share a slice
#pragma unroll
            for (int step = 1; step < LANES; step *= 2) squared[round] += __shfl_xor_sync(ALL, squared[round], step);
            if (threadIdx.x % LANES == 0) squares[(round * S::WORKERS + threadIdx.x) / LANES] = squared[round];
        }
        asm volatile("bar.sync 1, %0;" ::"n"(S::WORKERS) : "memory");  // Sinkhorn's warp has gone its way
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < MOST_SLICES / 32; ++i)
            if (lane + 32 * i < slices) sum += squares[lane + 32 * i];
        factor = norm_scale(sum, a.D, a.norm_eps);
    }
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int d = (round * S::WORKERS + threadIdx.x) * N, left = a.D - d;
        if (left <= 0) break;
        if constexpr (KIND == SEAM) {
            float w[N];
            load<N>(a.weight + d, w, left, a.wide);
#pragma unroll
            for (int k = 0; k < N; ++k) x[round][k] = x[round][k] * factor * w[k];
        }
        store<N>(a.x_out + token * a.D + d, x[round], left, a.wide);
    }
}

// One launch where its blocks all run at once, else two. few, four, eight, second: the op's kernels.
template <Kind KIND, typename Few, typename Many, typename Second, typename T>
static cudaError_t run(Few few, Many four, Many eight, Second second, const Args<T>& args, cudaStream_t stream) {
    using S = Shape<KIND>;
    if (args.D > MOST_COLUMNS) return cudaErrorInvalidValue;
    const int slices = (args.D + COLUMNS - 1) / COLUMNS;
    int device = 0, processors = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
        return error;
    if (args.tokens <= FEW && args.tokens * slices <= 2 * processors)  // two blocks fit on each
        return launch_dependent(few, slices, args.tokens, S::WORKERS, 0, stream, args);
    const int together = args.tokens <= 32 ? 4 : 8;  // fn is read once for so many
    const cudaError_t error = launch_dependent(together == 4 ? four : eight, slices,
                                               (args.tokens + together - 1) / together, S::WORKERS, 0, stream, args);
    if (error != cudaSuccess) return error;
    return launch_dependent(second, args.tokens, 1, S::THREADS, 0, stream, args, slices);
}

}  // namespace dsv4::mhc
