// The packed bytes of the KV cache (dsv4/quant/kv.py) to BF16, exactly.
#pragma once
#include <cstdint>

#include <dsv4/fragments.cuh>

namespace dsv4::kv {

// An entry: 448 E4M3 | 64 BF16 | 7 E8M0, each for 64 channels | 1 of padding.
constexpr int DH = 512, ROPE = 64, PLAIN = DH - ROPE, SCALES = PLAIN + 2 * ROPE, ENTRY_BYTES = 584;

// Both halves 2^(field - 127) as BF16, 0 < field < 255.
__device__ __forceinline__ uint32_t power_bf16x2(uint32_t field) { return field * 0x00800080u; }

// 8 E4M3 codes times 2^(byte - 127), the value of a scale byte; byte 255 marks a group that held NaN or Inf. A product
// has four significant bits, so BF16 holds it. A code moved to the sign, the exponent and the mantissa of BF16 is 2^120
// times too small, denormals included, and the product with a power of two is exact; that power can exceed BF16's range,
// and is then taken in two steps. The code of NaN stands in groups of byte 255 only.
__device__ __forceinline__ uint4 e4m3x8_to_bf16(uint2 codes, uint32_t byte) {
    const uint32_t factor = byte == 255 ? 0x7FFF7FFFu : power_bf16x2(min(byte + 120, 254u));
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t top = __byte_perm(i < 2 ? codes.x : codes.y, 0, i % 2 ? 0x3424 : 0x1404);  // bits 15..8 of halves
        pairs[i] = mul_bf16x2((top & 0x80008000u) | (top >> 4 & 0x07F007F0u), factor);
    }
    if (byte > 134 && byte < 255) {
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = mul_bf16x2(pairs[i], power_bf16x2(byte - 7));
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Channels 8 i .. 8 i + 7 of a packed entry that starts at a multiple of 8 bytes.
__device__ __forceinline__ uint4 channels8(const uint8_t* entry, int i) {
    if (8 * i < PLAIN)
        return e4m3x8_to_bf16(reinterpret_cast<const uint2*>(entry)[i], entry[SCALES + i / 8]);
    const uint2* tail = reinterpret_cast<const uint2*>(entry + PLAIN) + 2 * (i - PLAIN / 8);
    return make_uint4(tail[0].x, tail[0].y, tail[1].x, tail[1].y);
}

}  // namespace dsv4::kv
