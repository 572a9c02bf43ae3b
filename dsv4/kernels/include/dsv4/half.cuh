// BF16 values as FP16, scaled by a power of two that brings the largest of them to 2^15 .. 2^16: exact down to 2^-32 of
// that largest. NaN and Inf are not scaled, so that they arrive and spread as they should.
#pragma once
#include <dsv4/numbers.cuh>

namespace dsv4 {

// `largest`: the bits of the largest magnitude.
__device__ __forceinline__ int f16_shift(uint32_t largest) {
    const int exponent = largest >> 7;
    return exponent == 255 ? 0 : min(127 + 15 - exponent, 126);
}

__device__ __forceinline__ float power_of_two(int exponent) {  // -126 .. 127
    return __int_as_float((127 + exponent) << 23);
}

// Two BF16 to two FP16 times 2^shift.
__device__ __forceinline__ uint32_t to_f16(uint32_t pair, float factor) {
    const float low = low_half(pair) * factor, high = high_half(pair) * factor;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The larger magnitude of each half, as bits, so that NaN is the largest.
__device__ __forceinline__ uint32_t magnitudes(uint32_t most, uint32_t pair) {
    return __vmaxu2(most, pair & 0x7FFF7FFFu);
}

}  // namespace dsv4
