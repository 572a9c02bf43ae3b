// The mixes of an mHC site: ROWS dot products of a token's M streams with fn, and its sum of squares.
// A cluster of 8 blocks works on TT tokens; each block owns a slice of the D columns in all M streams, so that what it
// read for the products it needs again for the collapse. Partial sums meet in distributed shared memory, in rank order.
#pragma once
#include <dsv4/cluster.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/reduce.cuh>

namespace dsv4::mhc {

constexpr int M = 4;        // hc_mult of Flash and Pro
constexpr int CLUSTER = 8;  // the largest size every target supports
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int W = 4;  // columns per access

template <int ROWS, int TT>
struct Sums {
    float warps[WARPS][TT * (ROWS + 1)];
    float block[TT * (ROWS + 1)];
    float total[TT * (ROWS + 1)];  // [token][row]; the last row is the sum of squares
    float pre[TT][M];
};

struct Slice {
    int begin, end;
    __device__ Slice(int rank, int D) {
        const int width = (D + CLUSTER * W - 1) / (CLUSTER * W) * W;
        begin = min(rank * width, D);
        end = min(begin + width, D);
    }
    __device__ int vectors() const { return (end - begin + W - 1) / W; }
};

// Fills s.total in every block of the cluster. Ends after an arrive: the caller waits before it leaves.
template <int ROWS, int TT, typename T>
__device__ void mixes(Sums<ROWS, TT>& s, const T* h, const float* fn, int64_t token, int64_t tokens, int D, bool wide) {
    const Slice slice(cluster_rank(), D);
    const int vectors = slice.vectors(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sums[TT][ROWS + 1] = {};
    for (int i = threadIdx.x; i < M * vectors; i += THREADS) {
        const int d = slice.begin + i % vectors * W, left = slice.end - d;
        const int64_t column = static_cast<int64_t>(i / vectors) * D + d;
        float v[TT][W];
#pragma unroll
        for (int t = 0; t < TT; ++t) {
            load<W>(h + min(token + t, tokens - 1) * M * D + column, v[t], left, wide);
#pragma unroll
            for (int k = 0; k < W; ++k) sums[t][ROWS] = fmaf(v[t][k], v[t][k], sums[t][ROWS]);
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            float f[W];
            load<W>(fn + row * static_cast<int64_t>(M) * D + column, f, left, wide);
#pragma unroll
            for (int t = 0; t < TT; ++t)
#pragma unroll
                for (int k = 0; k < W; ++k) sums[t][row] = fmaf(f[k], v[t][k], sums[t][row]);
        }
    }
#pragma unroll
    for (int t = 0; t < TT; ++t)
#pragma unroll
        for (int row = 0; row <= ROWS; ++row) {
            const float sum = warp_sum(sums[t][row]);
            if (lane == 0) s.warps[warp][t * (ROWS + 1) + row] = sum;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < TT * (ROWS + 1); i += THREADS) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS; ++w) sum += s.warps[w][i];
        s.block[i] = sum;
    }
    cluster_arrive();
    cluster_wait();
    for (int i = threadIdx.x; i < TT * (ROWS + 1); i += THREADS) {
        float sum = 0.0f;
        for (int rank = 0; rank < CLUSTER; ++rank) sum += peer_value(&s.block[i], rank);
        s.total[i] = sum;
    }
    __syncthreads();
    cluster_arrive();
}

// (fn . v) * rsqrt(mean(v^2) + eps) * scale + base: one entry of the site's mixes.
template <int ROWS, int TT>
__device__ __forceinline__ float mix(const Sums<ROWS, TT>& s, int t, int row, int D, float scale, float base, float eps) {
    const float* total = s.total + t * (ROWS + 1);
    return total[row] * rsqrtf(total[ROWS] / static_cast<float>(M * D) + eps) * scale + base;
}

// x = sum_j pre_j h_j over this block's columns.
template <int ROWS, int TT, typename T>
__device__ void collapse(const Sums<ROWS, TT>& s, const T* h, T* x, int64_t token, int64_t tokens, int D, bool wide) {
    const Slice slice(cluster_rank(), D);
    const int vectors = slice.vectors();
    for (int i = threadIdx.x; i < TT * vectors; i += THREADS) {
        const int t = i / vectors, d = slice.begin + i % vectors * W, left = slice.end - d;
        if (token + t >= tokens) break;
        float sum[W] = {};
#pragma unroll
        for (int j = 0; j < M; ++j) {
            float v[W];
            load<W>(h + ((token + t) * M + j) * D + d, v, left, wide);
#pragma unroll
            for (int k = 0; k < W; ++k) sum[k] = fmaf(s.pre[t][j], v[k], sum[k]);
        }
        store<W>(x + (token + t) * D + d, sum, left, wide);
    }
}

}  // namespace dsv4::mhc
