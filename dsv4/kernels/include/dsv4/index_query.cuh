// The indexer's queries, eight heads of 128 channels by a warp: RoPE, then the Hadamard transform and the E2M1 rounding of
// groups of 32 channels. Lane (g, t) = (lane / 4, lane % 4) brings channels 32 t .. 32 t + 31 of head g as pairs and has,
// transformed, channels 16 g .. 16 g + 15 of heads 2 t and 2 t + 1.
// Four of the transform's seven steps, those of channel bits 4, 5, 6 and 0, are one product with the 16 x 16 matrix of
// signs (m16n8k16: rows and slots carry these bits, low to high, columns the heads); bits 1 to 3 are butterflies.
#pragma once
#include <dsv4/fragments.cuh>
#include <dsv4/mma.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/rope.cuh>

namespace dsv4::index {

constexpr int PAIRS = 16, WARP_HEADS = 8;

// What a lane reads of its head.
struct HeadShare {
    uint32_t x[PAIRS];
    int first;  // rotation of the first pair; before rotation 0 nothing turns
};

// chunk(c): the c-th 16 bytes of this lane's head. `dims`: the channels at the end that turn.
template <typename Chunk>
__device__ __forceinline__ HeadShare load_head(int dims, int t, Chunk chunk) {
    HeadShare s;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint4 word = chunk(4 * t + i);
        s.x[4 * i] = word.x, s.x[4 * i + 1] = word.y, s.x[4 * i + 2] = word.z, s.x[4 * i + 3] = word.w;
    }
    s.first = PAIRS * t - (64 - dims / 2);
    return s;
}

__device__ __forceinline__ void turn_pair(uint32_t& pair, float2 by) {
    float a = __uint_as_float(pair << 16), b = __uint_as_float(pair & 0xFFFF0000u);
    rotate(a, b, by);
    pair = bf16x2(a, b);
}

// by(i): the rotation of pair i, if it turns.
template <typename By>
__device__ __forceinline__ void turn(HeadShare& s, By by) {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i)
        if (s.first + i >= 0) turn_pair(s.x[i], by(i));
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

// y[j]: channels 16 g .. 16 g + 15 of head 2 t + j.
__device__ __forceinline__ void transform(uint32_t (&y)[2][8], const uint32_t (&x)[PAIRS], int lane) {
    const int g = lane / 4, t = lane % 4;
    const uint32_t even = __popc(g & 2 * t) & 1, odd = even ^ (g & 1);
    const uint32_t signs = (0x3F80u | even << 15) | (0x3F80u | odd << 15) << 16;
    const uint32_t matrix[4] = {signs, signs, signs, signs ^ 0x80008000u};
    float v[8][4];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[r][i] = 0.0f;
        mma_bf16(v[r], matrix, __byte_perm(x[r], x[r + 8], 0x5410), __byte_perm(x[r], x[r + 8], 0x7632));
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
#pragma unroll
        for (int r = 0; r < 8; ++r)
            if ((r & step) == 0)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float sum = v[r][i] + v[r + step][i];
                    v[r + step][i] = v[r][i] - v[r + step][i];
                    v[r][i] = sum;
                }
    constexpr float NORM = 0.08838834764831845f;  // 128^-0.5
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int r = 0; r < 8; ++r) y[j][r] = bf16x2(__fmul_rn(v[r][j], NORM), __fmul_rn(v[r][2 + j], NORM));
        round_group(y[j]);
    }
}

// The heads, turned, treated, as chunks of eight channels: put(head of the eight, chunk of its sixteen, the chunk).
template <typename Put>
__device__ __forceinline__ void treat_heads(HeadShare& s, bool quantize, int lane, Put put) {
    const int g = lane / 4, t = lane % 4;
    if (quantize) {
        uint32_t y[2][8];
        transform(y, s.x, lane);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c)
                put(2 * t + j, 2 * g + c, make_uint4(y[j][4 * c], y[j][4 * c + 1], y[j][4 * c + 2], y[j][4 * c + 3]));
    } else {
#pragma unroll
        for (int c = 0; c < 4; ++c)
            put(g, 4 * t + c, make_uint4(s.x[4 * c], s.x[4 * c + 1], s.x[4 * c + 2], s.x[4 * c + 3]));
    }
}

}  // namespace dsv4::index
