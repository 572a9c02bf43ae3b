// The packed bytes of the KV cache (dsv4/quant/kv.py) to BF16, exactly.
#pragma once
#include <cstdint>

#include <dsv4/fragments.cuh>

namespace dsv4::kv {

// An entry: 448 E4M3 | 64 BF16 | 7 E8M0, each for 64 channels | 1 of padding.
constexpr int DH = 512, ROPE = 64, PLAIN = DH - ROPE, SCALES = PLAIN + 2 * ROPE, ENTRY_BYTES = 584;

// 2^(byte - 127); byte 255 marks a group that held NaN or Inf.
__device__ __forceinline__ float e8m0(uint8_t byte) {
    const uint32_t bits = byte == 0 ? 0x00400000u : byte == 255 ? 0x7fffffffu : static_cast<uint32_t>(byte) << 23;
    return __uint_as_float(bits);
}

// Two E4M3 codes times a power of two: four significant bits, so BF16 holds them.
__device__ __forceinline__ uint32_t e4m3x2_to_bf16x2(uint16_t codes, float scale) {
    float low, high;
    asm("{.reg .b32 two; .reg .b16 l, h; cvt.rn.f16x2.e4m3x2 two, %2; mov.b32 {l, h}, two; "
        "cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "h"(codes));
    return bf16x2(low * scale, high * scale);
}

__device__ __forceinline__ uint4 e4m3x8_to_bf16(uint2 codes, float scale) {
    return make_uint4(e4m3x2_to_bf16x2(static_cast<uint16_t>(codes.x), scale),
                      e4m3x2_to_bf16x2(static_cast<uint16_t>(codes.x >> 16), scale),
                      e4m3x2_to_bf16x2(static_cast<uint16_t>(codes.y), scale),
                      e4m3x2_to_bf16x2(static_cast<uint16_t>(codes.y >> 16), scale));
}

// Channels 8 i .. 8 i + 7 of a packed entry that starts at a multiple of 8 bytes.
__device__ __forceinline__ uint4 channels8(const uint8_t* entry, int i) {
    if (8 * i < PLAIN)
        return e4m3x8_to_bf16(reinterpret_cast<const uint2*>(entry)[i], e8m0(entry[SCALES + i / 8]));
    const uint2* tail = reinterpret_cast<const uint2*>(entry + PLAIN) + 2 * (i - PLAIN / 8);
    return make_uint4(tail[0].x, tail[0].y, tail[1].x, tail[1].y);
}

}  // namespace dsv4::kv
