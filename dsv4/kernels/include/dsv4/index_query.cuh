// The indexer's queries, eight or four heads of 128 channels by a warp: RoPE, then the Hadamard transform and the E2M1
// rounding of groups of 32 channels. Lane (g, t) = (lane / 4, lane % 4) brings channels 32 t .. 32 t + 31 of head g as
// pairs and has, transformed, channels 16 g .. 16 g + 15 of heads 2 t and 2 t + 1. Of four heads it brings those of head
// g / 2 whose bit 3 is g % 2, and has channels 16 g .. 16 g + 15 of head t.
// Four of the transform's seven steps, those of channel bits 4, 5, 6 and 0, are one product with the 16 x 16 matrix of
// signs (m16n8k16: rows and slots carry these bits, low to high, columns the heads, or the halves of four heads that bit 3
// makes); bits 1 to 3 are butterflies.
#pragma once
#include <dsv4/fragments.cuh>
#include <dsv4/mma.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/rope.cuh>

namespace dsv4::index {

constexpr int PAIRS = 16, WARP_HEADS = 8;

// What a lane reads of its head.
template <int HEADS>
struct HeadShare {
    static constexpr int PAIRS = 2 * HEADS, APART = WARP_HEADS / HEADS;  // its chunks, of four pairs, are so far apart
    uint32_t x[PAIRS];
    int first;  // rotation of the first pair; before rotation 0 nothing turns

    static constexpr __device__ int pair(int i) { return i / 4 * 4 * APART + i % 4; }  // after the first
};

// chunk(c): the c-th 16 bytes of this lane's head. `dims`: the channels at the end that turn. `half`: g % 2, of four
// heads.
template <int HEADS = WARP_HEADS, typename Chunk>
__device__ __forceinline__ HeadShare<HEADS> load_head(int dims, int t, Chunk chunk, int half = 0) {
    HeadShare<HEADS> s;
#pragma unroll
    for (int i = 0; i < HEADS / 2; ++i) {
        const uint4 word = chunk(4 * t + s.APART * i + half);
        s.x[4 * i] = word.x, s.x[4 * i + 1] = word.y, s.x[4 * i + 2] = word.z, s.x[4 * i + 3] = word.w;
    }
    s.first = 16 * t + 4 * half - (64 - dims / 2);
    return s;
}

__device__ __forceinline__ void turn_pair(uint32_t& pair, float2 by) {
    float a = low_half(pair), b = high_half(pair);
    rotate(a, b, by);
    pair = bf16x2(a, b);
}

// by(i): the rotation of pair i, anything if it does not turn.
template <int HEADS, typename By>
__device__ __forceinline__ void turn(HeadShare<HEADS>& s, By by) {
#pragma unroll
    for (int i = 0; i < s.PAIRS; ++i) {
        uint32_t turned = s.x[i];
        turn_pair(turned, by(i));
        if (s.first + s.pair(i) >= 0) s.x[i] = turned;
    }
}

__device__ __forceinline__ uint32_t max_bf16x2(uint32_t x, uint32_t y) {
    uint32_t z;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t x, uint32_t y, uint32_t z) {
    uint32_t sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(y), "r"(z));
    return sum;
}

// Eight pairs, and those of the lane beside it, rounded to E2M1 times the smallest power of two that brings all of them
// to 6 or less; NaN where one of them is not finite.
__device__ __forceinline__ void round_group(uint32_t (&y)[8]) {
    uint32_t amax = 0;  // as bits
#pragma unroll
    for (int r = 0; r < 8; ++r) amax = max(amax, max(y[r] << 16 & 0x7FFF0000u, y[r] & 0x7FFF0000u));
    amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 4));
    const float low = 6.0f * 0x1p-126f, largest = __uint_as_float(amax);
    const float wanted = __fmul_rn(largest < low ? low : largest, static_cast<float>(1.0 / 6.0));
    const uint32_t up = (__float_as_uint(wanted) + 0x007fffffu) & 0x7f800000u;
    const uint32_t scale = amax < 0x7f800000u ? up : 0x7FFF0000u;
    const uint32_t inverse = amax < 0x7f800000u ? (254u << 23) - up : 0x7FFF0000u;
    const uint32_t units = scale | scale >> 16, per_unit = inverse | inverse >> 16;
#pragma unroll
    for (int r = 0; r < 8; ++r) {
        const uint32_t x = mul_bf16x2(y[r], per_unit);
        const uint32_t power = max_bf16x2(x & 0x7FFF7FFFu, 0x3F803F80u) & 0x7F807F80u;
        // The last place of x + 96 power is power / 2, a step of E2M1: the addition rounds, to nearest even.
        const uint32_t stepped = fma_bf16x2(power, 0x42C042C0u, x);
        const uint32_t rounded = mul_bf16x2(fma_bf16x2(power, 0xC2C0C2C0u, stepped), units);
        y[r] = rounded | (y[r] & 0x80008000u);
    }
}

// y[j]: channels 16 g .. 16 g + 15 of head 2 t + j, or of head t.
template <int HEADS>
__device__ __forceinline__ void transform(uint32_t (&y)[HEADS / 4][8], const uint32_t (&x)[2 * HEADS], int lane) {
    constexpr int MINE = HEADS / 4;
    const int g = lane / 4, t = lane % 4;
    const uint32_t even = __popc(g & 2 * t) & 1, odd = even ^ (g & 1);
    const uint32_t signs = (0x3F80u | even << 15) | (0x3F80u | odd << 15) << 16;
    const uint32_t matrix[4] = {signs, signs, signs, signs ^ 0x80008000u};
    float v[8][2 * MINE];  // by the butterflies' bits; j, then the row
#pragma unroll
    for (int m = 0; m < HEADS; ++m) {
        float product[4] = {};
        const uint32_t low = x[m], high = x[m + HEADS];
        mma_bf16(product, matrix, __byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632));
#pragma unroll
        for (int i = 0; i < 4; ++i) v[MINE == 2 ? m : m + i % 2 * 4][MINE == 2 ? i : i / 2] = product[i];
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
#pragma unroll
        for (int r = 0; r < 8; ++r)
            if ((r & step) == 0)
#pragma unroll
                for (int i = 0; i < 2 * MINE; ++i) {
                    const float sum = v[r][i] + v[r + step][i];
                    v[r + step][i] = v[r][i] - v[r + step][i];
                    v[r][i] = sum;
                }
    constexpr float NORM = 0.08838834764831845f;  // 128^-0.5
#pragma unroll
    for (int j = 0; j < MINE; ++j) {
#pragma unroll
        for (int r = 0; r < 8; ++r) y[j][r] = bf16x2(__fmul_rn(v[r][j], NORM), __fmul_rn(v[r][MINE + j], NORM));
        round_group(y[j]);
    }
}

// The heads, turned, treated, as chunks of eight channels: put(head of the warp's, chunk of its sixteen, the chunk).
template <int HEADS, typename Put>
__device__ __forceinline__ void treat_heads(HeadShare<HEADS>& s, bool quantize, int lane, Put put) {
    const int g = lane / 4, t = lane % 4;
    if (quantize) {
        uint32_t y[HEADS / 4][8];
        transform<HEADS>(y, s.x, lane);
#pragma unroll
        for (int j = 0; j < HEADS / 4; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c)
                put(HEADS / 4 * t + j, 2 * g + c,
                    make_uint4(y[j][4 * c], y[j][4 * c + 1], y[j][4 * c + 2], y[j][4 * c + 3]));
    } else {
#pragma unroll
        for (int c = 0; c < HEADS / 2; ++c)
            put(g / s.APART, 4 * t + s.APART * c + g % s.APART,
                make_uint4(s.x[4 * c], s.x[4 * c + 1], s.x[4 * c + 2], s.x[4 * c + 3]));
    }
}

}  // namespace dsv4::index
