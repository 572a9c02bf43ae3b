// BF16 activations as the B side of FP16 products. FP16 has more mantissa and less range, so a slice of a row is scaled
// by the power of two that brings its largest magnitude to 2^15 .. 2^16. That is exact for every value down to 2^-32 of
// that largest; what lies below keeps an absolute error of at most 2^-40 of it. The factor is taken back from the
// slice's float32 sum, exactly. NaN and Inf arrive as such and spread as they should.
#pragma once
#include <dsv4/numbers.cuh>

namespace dsv4 {

constexpr int SLICE = 512;  // columns scaled together: 16 a lane

// Columns of a row as pairs, one by one; zeros from `left` columns on.
template <int PAIRS>
__device__ __forceinline__ void load_narrow(uint32_t (&pairs)[PAIRS], const bf16* p, int left) {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        const uint32_t low = 2 * i < left ? p[2 * i].bits : 0, high = 2 * i + 1 < left ? p[2 * i + 1].bits : 0;
        pairs[i] = low | high << 16;
    }
}

// 16 columns of a row, aligned to 16 bytes, as eight pairs; zeros if they do not exist.
__device__ __forceinline__ void load_columns(uint32_t (&pairs)[8], const bf16* p, bool exist) {
    uint4 x = {}, y = {};
    if (exist) x = reinterpret_cast<const uint4*>(p)[0], y = reinterpret_cast<const uint4*>(p)[1];
    pairs[0] = x.x, pairs[1] = x.y, pairs[2] = x.z, pairs[3] = x.w;
    pairs[4] = y.x, pairs[5] = y.y, pairs[6] = y.z, pairs[7] = y.w;
}

// The same with zeros from `left` columns on. wide: p is aligned to 16 bytes and rows are whole.
__device__ __forceinline__ void load_columns(uint32_t (&pairs)[8], const bf16* p, int left, bool wide) {
    if (wide && left >= 16) load_columns(pairs, p, true);
    else load_narrow(pairs, p, left);
}

// The slice that the 32 lanes of a warp hold, from BF16 to scaled FP16 in place. Returns what undoes the scaling.
__device__ __forceinline__ float scale_to_f16(uint32_t (&pairs)[8]) {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = __vmaxu2(most, pairs[i] & 0x7FFF7FFFu);
    const uint32_t largest = __reduce_max_sync(0xFFFFFFFFu, max(most & 0xFFFFu, most >> 16));
    const int exponent = min(largest >> 7, 254u);  // beside NaN or Inf, the largest finite value fits
    const int shift = min(127 + 15 - exponent, 126);
    const float factor = __int_as_float((127 + shift) << 23);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float low = low_half(pairs[i]) * factor;
        const float high = high_half(pairs[i]) * factor;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pairs[i]) : "f"(high), "f"(low));
    }
    return __int_as_float((127 - shift) << 23);
}

// Two FP16 values times `factor`, as BF16.
__device__ __forceinline__ uint32_t f16x2_to_bf16x2(uint32_t halves, float factor) {
    float low, high;
    uint32_t pair;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(halves));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high * factor), "f"(low * factor));
    return pair;
}

}  // namespace dsv4
