// mhc_seam: a block takes 64 columns, in all M streams, of TT tokens: it leaves the old site, writes the new streams and
// its share of the 25 sums. Then one block per token adds the shares, always in the same order, and finishes: mixes,
// collapse and norm in 512 threads, Sinkhorn beside them in a warp of its own. For a few tokens that block is the last
// to arrive, within the same launch; for many it is one of a second launch.
#include <dsv4/dependent.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/reduce.cuh>

using namespace dsv4;

namespace {

constexpr int M = 4, W = 4;                         // streams; columns per thread while the sums are made
constexpr int ROWS = (2 + M) * M, SUMS = ROWS + 1;  // pre | post | comb, and the sum of squares
constexpr int COLUMNS = 64, PLACES = M * COLUMNS / W;
constexpr int WORKERS = 512, WARPS = WORKERS / 32, THREADS = WORKERS + 32;
constexpr int TEAM = WORKERS / PLACES, SHARE = ROWS / TEAM;  // 8 teams of 64 threads, 3 rows of fn each
constexpr int FEW = 4;                                       // tokens that one launch finishes
static_assert(PLACES == 64 && SHARE == 3 && SHARE * TEAM == ROWS, "two warps hold a team's places");

__device__ unsigned arrived[FEW];  // always 0 between launches, which must follow one another

__device__ __forceinline__ void workers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory"); }

// Of the finishing block's 512 threads over up to 8192 columns.
template <typename T>
constexpr int rounds = 8192 / WORKERS / wide_elements<T>;

template <typename T>
union Raw {
    uint4 chunk;
    T element[wide_elements<T>];
};

// Written by other blocks of this launch: past the L1 cache.
__device__ __forceinline__ bf16 fresh(const bf16* p) { return {__ldcg(&p->bits)}; }
__device__ __forceinline__ float fresh(const float* p) { return __ldcg(p); }
template <typename T>
__device__ __forceinline__ void load_fresh(const T* p, Raw<T>& raw, int left, bool wide) {
    if (wide) {
        raw.chunk = __ldcg(reinterpret_cast<const uint4*>(p));
    } else {
#pragma unroll
        for (int i = 0; i < wide_elements<T>; ++i) raw.element[i] = i < left ? fresh(p + i) : from_float<T>(0.0f);
    }
}

// One thread's 4 x 4. A row or column is multiplied by the inverse of its sum: one rounding more, which the next step
// corrects, in place of three divisions.
__device__ __forceinline__ float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ void scale_rows(float (&c)[M][M], float eps) {
#pragma unroll
    for (int j = 0; j < M; ++j) {
        const float factor = inverse((c[j][0] + c[j][1]) + (c[j][2] + c[j][3]) + eps);
#pragma unroll
        for (int k = 0; k < M; ++k) c[j][k] *= factor;
    }
}
__device__ __forceinline__ void scale_columns(float (&c)[M][M], float eps) {
#pragma unroll
    for (int k = 0; k < M; ++k) {
        const float factor = inverse((c[0][k] + c[1][k]) + (c[2][k] + c[3][k]) + eps);
#pragma unroll
        for (int j = 0; j < M; ++j) c[j][k] *= factor;
    }
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
    const unsigned all = 0xffffffffu;
    const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
    const float a = (upper ? sums[2] : sums[0]) + __shfl_xor_sync(all, upper ? sums[0] : sums[2], 16);
    const float b = (upper ? sums[3] : sums[1]) + __shfl_xor_sync(all, upper ? sums[1] : sums[3], 16);
    float sum = (odd ? b : a) + __shfl_xor_sync(all, odd ? a : b, 8);
#pragma unroll
    for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(all, sum, step);
    return sum;
}

template <typename T>
struct Args {
    const T *y, *h;
    const float *post, *comb, *fn, *base, *scale, *weight;
    T *h_out, *x_out;
    float *post_out, *comb_out, *shares;  // shares [T, slices, SUMS]
    int64_t tokens, y_stride;
    int D, iters;
    float hc_eps, norm_eps;
    bool wide;
};

// This block's columns: h' = post y + comb^T h, rounded, and their products with fn.
template <int TT, typename T>
__device__ void leave(const Args<T>& a, int64_t first) {
    __shared__ float warps[WARPS][TT][SHARE + 1];
    const int place = threadIdx.x % PLACES, team = threadIdx.x / PLACES, warp = threadIdx.x / 32;
    const int stream = place / (COLUMNS / W), d = blockIdx.x * COLUMNS + place % (COLUMNS / W) * W, left = a.D - d;
    if (threadIdx.x < WORKERS) {
        const bool wide = a.wide && left > 0;
        float f[SHARE][W], old[M][W], from[W];
#pragma unroll
        for (int i = 0; i < SHARE; ++i)
            load<W>(a.fn + (static_cast<int64_t>(team * SHARE + i) * M + stream) * a.D + d, f[i], left, wide);
#pragma unroll
        for (int t = 0; t < TT; ++t) {
            const int64_t token = min(first + t, a.tokens - 1);
            load<W>(a.y + token * a.y_stride + d, from, left, wide);
#pragma unroll
            for (int j = 0; j < M; ++j) load<W>(a.h + (token * M + j) * a.D + d, old[j], left, wide);
            float v[W] = {};
#pragma unroll
            for (int j = 0; j < M; ++j) {
                const float mix = a.comb[(token * M + j) * M + stream];
#pragma unroll
                for (int k = 0; k < W; ++k) v[k] = fmaf(old[j][k], mix, v[k]);
            }
            const float gain = a.post[token * M + stream];
#pragma unroll
            for (int k = 0; k < W; ++k) v[k] = rounded<T>(fmaf(from[k], gain, v[k]));
            if (team == 0 && left > 0 && first + t < a.tokens)
                store<W>(a.h_out + (token * M + stream) * a.D + d, v, left, wide);
            float sums[SHARE + 1] = {};
#pragma unroll
            for (int k = 0; k < W; ++k) {
#pragma unroll
                for (int i = 0; i < SHARE; ++i) sums[i] = fmaf(f[i][k], v[k], sums[i]);
                sums[SHARE] = fmaf(v[k], v[k], sums[SHARE]);
            }
            const float sum = four_sums(sums);
            if (threadIdx.x % 8 == 0) warps[warp][t][threadIdx.x % 32 / 8] = sum;
        }
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
    if (warp < TT && first + warp < a.tokens && lane < SUMS) {
        const int from = lane / SHARE % TEAM * 2, row = lane == ROWS ? SHARE : lane % SHARE;  // squares: team 0's
        a.shares[((first + warp) * gridDim.x + blockIdx.x) * SUMS + lane] =
            warps[from][warp][row] + warps[from + 1][warp][row];
    }
}

// What needs whole tokens, of one of them.
template <typename T>
__device__ void enter(const Args<T>& a, int64_t token, int slices) {
    constexpr int N = wide_elements<T>, ROUNDS = rounds<T>;
    __shared__ float totals[WARPS][SUMS], mixes[ROWS], pre[M], squares[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Raw<T> streams[ROUNDS][M];
    if (warp < WARPS) {
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {  // while the sums are made
            const int d = (round * WORKERS + threadIdx.x) * N, left = a.D - d;
#pragma unroll
            for (int j = 0; j < M; ++j)
                load_fresh(a.h_out + (token * M + j) * a.D + d, streams[round][j], left, a.wide && left > 0);
        }
        if (lane < SUMS) {
            float sum = 0.0f;
#pragma unroll 4
            for (int slice = warp; slice < slices; slice += WARPS)
                sum += __ldcg(a.shares + (token * slices + slice) * SUMS + lane);
            totals[warp][lane] = sum;
        }
    }
    __syncthreads();
    if (warp == 0) {
        float total = 0.0f;
        if (lane < SUMS)
#pragma unroll
            for (int i = 0; i < WARPS; ++i) total += totals[i][lane];
        const float square = __shfl_sync(0xffffffffu, total, ROWS);
        const int row = min(lane, ROWS - 1);
        const float z = total * rsqrtf(square / static_cast<float>(M * a.D) + a.norm_eps) * a.scale[row] + a.base[row];
        if (lane < ROWS) mixes[lane] = z;
        if (lane < M) pre[lane] = sigmoid(z) + a.hc_eps;
        if (lane >= M && lane < 2 * M) a.post_out[token * M + lane - M] = 2.0f * sigmoid(z);
    }
    __syncthreads();
    if (warp == WARPS) {
        if (lane != 0) return;
        float c[M][M];
#pragma unroll
        for (int i = 0; i < M * M; ++i) c[i / M][i % M] = mixes[2 * M + i];
        sinkhorn(c, a.iters, a.hc_eps);
#pragma unroll
        for (int i = 0; i < M * M; ++i) a.comb_out[token * M * M + i] = c[i / M][i % M];
        return;
    }
    float x[ROUNDS][N], square = 0.0f;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round)
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < M; ++j) sum = fmaf(pre[j], to_float(streams[round][j].element[k]), sum);
            x[round][k] = rounded<T>(sum);
            square = fmaf(x[round][k], x[round][k], square);
        }
    square = warp_sum(square);
    if (lane == 0) squares[warp] = square;
    workers_sync();
    square = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) square += squares[i];
    const float scale = rsqrtf(square / static_cast<float>(a.D) + a.norm_eps);
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int d = (round * WORKERS + threadIdx.x) * N;
        if (d >= a.D) break;
        float w[N];
        load<N>(a.weight + d, w, a.D - d, a.wide);
#pragma unroll
        for (int k = 0; k < N; ++k) x[round][k] = x[round][k] * scale * w[k];
        store<N>(a.x_out + token * a.D + d, x[round], a.D - d, a.wide);
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS) mhc_seam(Args<T> a) {
    __shared__ bool last;
    take_turn();
    leave<1>(a, blockIdx.y);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(&arrived[blockIdx.y], 1u) == gridDim.x - 1;
        if (last) arrived[blockIdx.y] = 0;
        __threadfence();
    }
    __syncthreads();
    if (last) enter(a, blockIdx.y, gridDim.x);
}

template <int TT, typename T>
__global__ void __launch_bounds__(WORKERS) mhc_leave(Args<T> a) {
    take_turn();
    leave<TT>(a, static_cast<int64_t>(blockIdx.y) * TT);
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 2) mhc_enter(Args<T> a, int slices) {
    take_turn();
    enter(a, blockIdx.x, slices);
}

template <typename T>
cudaError_t run(const void* y, const void* h, const float* post, const float* comb, const float* fn,
                       const float* base, const float* scale, const float* weight, void* h_out, void* x_out,
                       float* post_out, float* comb_out, float* shares, int64_t tokens, int D, int64_t y_stride, int iters,
                       float hc_eps, float norm_eps, cudaStream_t stream) {
    constexpr int N = wide_elements<T>;
    const bool wide = D % N == 0 && y_stride % N == 0 && aligned16(y) && aligned16(h) && aligned16(fn) &&
                      aligned16(weight) && aligned16(h_out) && aligned16(x_out);
    if (D > rounds<T> * WORKERS * N) return cudaErrorInvalidValue;
    const Args<T> args = {static_cast<const T*>(y), static_cast<const T*>(h), post,     comb,     fn,     base,
                          scale, weight, static_cast<T*>(h_out), static_cast<T*>(x_out), post_out, comb_out, shares,
                          tokens, y_stride, D, iters, hc_eps, norm_eps, wide};
    const int slices = (D + COLUMNS - 1) / COLUMNS;
    if (tokens <= FEW) return launch_dependent(mhc_seam<T>, slices, tokens, THREADS, 0, stream, args);
    const int together = tokens <= 32 ? 4 : 8;  // fn is read once for so many
    const cudaError_t error = launch_dependent(together == 4 ? mhc_leave<4, T> : mhc_leave<8, T>, slices,
                                               (tokens + together - 1) / together, WORKERS, 0, stream, args);
    if (error != cudaSuccess) return error;
    return launch_dependent(mhc_enter<T>, tokens, 1, THREADS, 0, stream, args, slices);
}

}  // namespace

extern "C" int dsv4_mhc_seam(const void* y, const void* h, const float* post, const float* comb, const float* fn,
                             const float* base, const float* scale, const float* weight, void* h_out, void* x_out,
                             float* post_out, float* comb_out, float* shares, int64_t tokens, int D, int64_t y_stride,
                             int iters, float hc_eps, float norm_eps, int dtype, cudaStream_t stream) {
    if (tokens == 0) return cudaSuccess;
    auto go = dtype == BF16 ? run<bf16> : run<float>;
    return go(y, h, post, comb, fn, base, scale, weight, h_out, x_out, post_out, comb_out, shares, tokens, D, y_stride,
              iters, hc_eps, norm_eps, stream);
}
