// What one projection of all experts reads and writes, and what is done with a finished sum. Pairs (token, expert) are
// sorted by expert; a pair's place is where it comes.
#pragma once
#include <dsv4/numbers.cuh>
#include <dsv4/swiglu.cuh>
#include <dsv4/w4.cuh>

namespace dsv4::moe {

constexpr int TOKENS = 8;  // that a product takes
constexpr unsigned ALL = 0xffffffffu;

struct Group {
    int expert, first, count, unused;  // pairs first .. first + count - 1 of the sorted list
};

struct Plan {
    int* pairs;     // [T K] pair (t K + k) at each sorted place
    int* places;    // [T K] places of each token's pairs, rising; -1: an expert that is not here, left out
    Group* groups;  // rising by expert
    int* count;     // [1] groups
};

// FIRST: gate and up. A tile of 16 rows holds rows 8 r .. 8 r + 7 of gate, then the same of up, so that a lane's rows g
// and g + 8 are a pair; the result is what the second projection takes. Else: down, 16 rows of the hidden width.
struct Job {
    const uint8_t* tiles;    // [E, R, KB, 576] (kernels/tiles.py)
    const float* alpha;      // [E, 2] (gate, up) or [E]: the globals
    const bf16* x;           // FIRST: [T, K]; else [T K, K] by place
    int64_t x_row;           // elements between rows
    const float* row_scale;  // factor of a row of x, or null
    const float* weights;    // [T K] routing weights
    bf16* out;               // [T K, 8 R] or [T K, 16 R] by place
    Plan plan;
    int topk, rows, blocks, columns;  // experts per token; R; KB; K
    float limit;
};

__device__ __forceinline__ Group group_at(const Plan& plan, int index) {
    const int4 g = __ldcg(reinterpret_cast<const int4*>(plan.groups) + index);
    return {g.x, g.y, g.z, g.w};
}

// The row of x that a place multiplies.
template <bool FIRST>
__device__ __forceinline__ int source(const Job& job, int place) {
    return FIRST ? __ldcg(job.plan.pairs + place) / job.topk : place;
}

template <bool FIRST>
__device__ __forceinline__ float alpha_of(const Job& job, int expert, int half) {
    return job.alpha[FIRST ? 2 * expert + half : expert] * w4::UNDO;
}

// What the second projection takes, out of gate and up as BF16 rounds them.
__device__ __forceinline__ bf16 activated(float gate, float up, float limit, float weight) {
    return from_float<bf16>(swiglu(rounded<bf16>(gate), rounded<bf16>(up), limit) * weight);
}

}  // namespace dsv4::moe
