// What the two kernels of sparse_attention share: where entries and queries lie, a query's norm and turn, a pair's turn
// back. Positions: the window's entries take a multiple of 128 positions, the selected ones follow; a tile is 16
// positions. Heads are the rows of every product.
#pragma once
#include <dsv4/fragments.cuh>
#include <dsv4/kv_entry.cuh>
#include <dsv4/launch.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/reduce.cuh>
#include <dsv4/rope.cuh>

namespace dsv4::attention {

using kv::DH;

constexpr int TILE = 16, WINDOW = 128;
constexpr int ROW = DH * 2 + 16;  // bytes between rows of queries and entries in shared memory
constexpr float LOWEST = -1e30f;  // the maximum over nothing, as in the twin
constexpr unsigned ALL = 0xffffffffu;

struct Source {
    const uint8_t* data;
    const int64_t* rows;  // [T, width]
    int64_t row_stride;
    int width;
    bool packed;
};

struct Arguments {
    const uint8_t* q;    // [T, H, 512] BF16, contiguous
    const float2* turn;  // queries are normed and turned first; null: they have been
    int64_t turn_stride;
    Source local, pool;
    const float* sink;
    const float2* cis;
    int64_t cis_stride;
    bf16* out;
    int heads, groups, rope, local_positions;
    float scale, eps;

    __host__ __device__ int positions() const { return local_positions + pool.width; }

    // Where the row number at a position of a token stands; null for none.
    __device__ __forceinline__ const int64_t* place_of(int64_t token, int position) const {
        const bool in_window = position < local_positions;
        const Source& from = in_window ? local : pool;
        const int at = position - (in_window ? 0 : local_positions);
        return at < from.width ? from.rows + token * from.row_stride + at : nullptr;
    }
    // The row number itself; -1 for none.
    __device__ __forceinline__ int row_at(int64_t token, int position) const {
        const int64_t* place = place_of(token, position);
        return place != nullptr ? static_cast<int>(*place) : -1;
    }
};

// Out of what the launcher is called with; groups is left to others.
static cudaError_t describe(Arguments* a, const void* q, const void* local, const void* local_rows, const void* pool,
                            const void* pool_rows, const void* sink, const void* cis, const void* turn, void* out,
                            int64_t turn_stride, int64_t local_stride, int64_t pool_stride, int64_t cis_stride,
                            int heads, int local_width, int pool_width, int local_packed, int pool_packed, int rope,
                            float scale, float eps) {
    if (!aligned16(q) || !aligned16(local) || !aligned16(pool) || !aligned16(out)) return cudaErrorMisalignedAddress;
    *a = {};
    a->q = static_cast<const uint8_t*>(q);
    a->local = {static_cast<const uint8_t*>(local), static_cast<const int64_t*>(local_rows), local_stride, local_width,
                local_packed != 0};
    a->pool = {static_cast<const uint8_t*>(pool), static_cast<const int64_t*>(pool_rows), pool_stride, pool_width,
               pool_packed != 0};
    a->sink = static_cast<const float*>(sink);
    a->cis = static_cast<const float2*>(cis);
    a->cis_stride = cis_stride;
    a->out = static_cast<bf16*>(out);
    a->heads = heads, a->rope = rope, a->scale = scale, a->eps = eps;
    a->turn = static_cast<const float2*>(turn), a->turn_stride = turn_stride;
    a->local_positions = max((local_width + WINDOW - 1) / WINDOW, 1) * WINDOW;
    return cudaSuccess;
}

// A lane's part of a head: channels 8 l .. 8 l + 7 and 256 + those, as BF16 pairs.
using Query = uint32_t[2][4];

// As it came; zeros where there is no such head.
__device__ __forceinline__ void load_query(Query& q, const Arguments& a, int64_t token, int head, int lane) {
    const uint4* from = reinterpret_cast<const uint4*>(a.q + (token * a.heads + head) * (DH * 2)) + lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 x = head < a.heads ? from[32 * half] : make_uint4(0, 0, 0, 0);
        q[half][0] = x.x, q[half][1] = x.y, q[half][2] = x.z, q[half][3] = x.w;
    }
}

// The rotations of a lane's upper channels.
__device__ __forceinline__ void load_turns(float2 (&turns)[4], const Arguments& a, int64_t token, int lane) {
    const int above = DH / 2 + lane * 8 - (DH - a.rope);  // the first rotated channel
    const float2* from = a.turn + token * a.turn_stride + above / 2;
#pragma unroll
    for (int k = 0; k < 4; ++k) turns[k] = above + 2 * k >= 0 ? from[k] : make_float2(1.0f, 0.0f);
}

// A query normed and turned: the same steps, in the same order, as the kernel of q_norm_rope.
__device__ __forceinline__ void norm_rope(Query& q, const float2 (&turns)[4], const Arguments& a, int lane) {
    float sum = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float x = low_half(q[half][k]), y = high_half(q[half][k]);
            const uint32_t squares = bf16x2(x * x, y * y);
            sum += low_half(squares);
            sum += high_half(squares);
        }
    const float mean = rounded<bf16>(warp_sum(sum) / static_cast<float>(DH));
    const float root = rounded<bf16>(rsqrtf(rounded<bf16>(mean + a.eps)));
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int k = 0; k < 4; ++k) q[half][k] = bf16x2(low_half(q[half][k]) * root, high_half(q[half][k]) * root);
#pragma unroll
    for (int k = 0; k < 4; ++k)
        if (DH / 2 + lane * 8 + 2 * k >= DH - a.rope) {
            float x = low_half(q[1][k]), y = high_half(q[1][k]);
            rotate(x, y, turns[k]);
            q[1][k] = bf16x2(x, y);
        }
}

// To row `to` of the queries in shared memory.
__device__ __forceinline__ void put_query(uint8_t* to, const Query& q, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint4*>(to + half * DH + lane * 16) = make_uint4(q[half][0], q[half][1], q[half][2], q[half][3]);
}

// The rotation back of the pair that starts at a channel; none below the rotated ones.
__device__ __forceinline__ float2 turn_back(const Arguments& a, int64_t token, int channel) {
    const int first = DH - a.rope;
    return channel >= first ? a.cis[token * a.cis_stride + (channel - first) / 2] : make_float2(1.0f, 0.0f);
}

// A pair of results, rounded, turned back and rounded.
__device__ __forceinline__ uint32_t result(float x, float y, float2 back, bool turned) {
    const uint32_t pair = bf16x2(x, y);
    if (!turned) return pair;
    x = low_half(pair), y = high_half(pair);
    rotate(x, y, back);
    return bf16x2(x, y);
}

}  // namespace dsv4::attention
