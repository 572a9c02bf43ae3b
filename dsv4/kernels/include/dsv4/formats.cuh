// E2M1, E4M3 and power-of-two scales of 16 values that one thread holds: the arithmetic of dsv4/quant, bit for bit.
// Magnitudes are compared as bits, so a NaN is the largest and reaches every scale it belongs to.
#pragma once
#include <cstdint>

namespace dsv4 {

constexpr int GROUP = 16;  // values that share an E4M3 scale; a thread's share of a row
constexpr uint32_t EXPONENT = 0x7f800000u, MANTISSA = 0x007fffffu, SIGN = 0x80000000u;

__device__ __forceinline__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & ~SIGN; }

// max and min that keep a NaN of x.
__device__ __forceinline__ float at_least(float x, float low) { return x < low ? low : x; }
__device__ __forceinline__ float at_most(float x, float high) { return x > high ? high : x; }

__device__ __forceinline__ uint32_t group_amax(const float (&x)[GROUP]) {
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) amax = max(amax, magnitude_bits(x[i]));
    return amax;
}

__device__ __forceinline__ uint8_t e4m3_encode(float x) {  // to nearest even, saturating; NaN is 0x7f
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    return static_cast<uint8_t>(pair);
}

__device__ __forceinline__ float e4m3_value(uint8_t byte) {
    float x;
    asm("{.reg .b32 two; .reg .b16 low, high; cvt.rn.f16x2.e4m3x2 two, %1; mov.b32 {low, high}, two; "
        "cvt.f32.f16 %0, low;}"
        : "=f"(x)
        : "h"(static_cast<uint16_t>(byte)));
    return x;
}

// Code 0..7 of y >= 0. The sum's last place is half of y's power of two, so the addition rounds to the grid.
__device__ __forceinline__ uint32_t e2m1_encode(float y) {
    y = fminf(y, 6.0f);
    const uint32_t power = __float_as_uint(fmaxf(y, 1.0f)) & EXPONENT;
    const float sum = __fadd_rn(y, __fmul_rn(__uint_as_float(power), 6291457.0f));  // 1.5 * 2^22 + 1
    return (__float_as_uint(sum) + (power >> 22)) & 7u;
}

__device__ __forceinline__ float e2m1_value(uint32_t code) {  // of a code 0..7
    return code < 2 ? 0.5f * code : __uint_as_float((code / 2 + 126) << 23 | (code & 1) << 22);
}

// NVFP4: value = e2m1(code) * scale * global.
struct Nvfp4Group {
    uint2 codes;  // 16 codes, the even index in the low nibble
    uint8_t scale;
};

__device__ __forceinline__ float nvfp4_global(uint32_t row_amax) {
    return __fdiv_rn(at_least(__uint_as_float(row_amax), 0x1p-100f), 2688.0f);
}

__device__ __forceinline__ Nvfp4Group nvfp4_group(const float (&x)[GROUP], float global) {
    const float amax = __uint_as_float(group_amax(x));
    Nvfp4Group group;
    group.scale = e4m3_encode(at_most(at_least(__fdiv_rn(amax, __fmul_rn(global, 6.0f)), 0x1p-9f), 448.0f));
    const float divisor = __fmul_rn(e4m3_value(group.scale), global);
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
        const uint32_t code = e2m1_encode(__fdiv_rn(fabsf(x[i]), divisor)) | (__float_as_uint(x[i]) >> 31) << 3;
        words[i / 8] |= code << (4 * (i % 8));
    }
    group.codes = make_uint2(words[0], words[1]);
    return group;
}

// e2m1 * scale, without the global: exact in BF16.
__device__ __forceinline__ void nvfp4_values(const Nvfp4Group& group, float (&v)[GROUP]) {
    const float scale = e4m3_value(group.scale);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
        const uint32_t code = (i < 8 ? group.codes.x : group.codes.y) >> (4 * (i % 8));
        v[i] = __uint_as_float(__float_as_uint(e2m1_value(code & 7) * scale) | (code & 8) << 28);
    }
}

// FP8 activations: the power of two a group with this largest magnitude is divided by, and q * scale.
__device__ __forceinline__ float fp8_scale(uint32_t amax) {
    const float largest = __fmul_rn(at_least(__uint_as_float(amax), 1e-4f), static_cast<float>(1.0 / 448.0));
    return __uint_as_float((__float_as_uint(largest) + MANTISSA) & EXPONENT);
}

__device__ __forceinline__ float fp8_value(float x, float scale) {
    const float y = __fdiv_rn(fabsf(x), scale);
    const float power = __uint_as_float(__float_as_uint(fmaxf(y, 0x1p-6f)) & EXPONENT);
    const float magic = __fmul_rn(power, 1572864.0f);  // 1.5 * 2^20: the sum's last place is an eighth of the power
    return copysignf(__fmul_rn(__fsub_rn(__fadd_rn(y, magic), magic), scale), x);
}

}  // namespace dsv4
