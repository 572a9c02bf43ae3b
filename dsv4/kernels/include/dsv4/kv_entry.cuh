// The packed bytes of the KV cache (dsv4/quant/kv.py) to BF16, exactly.
#pragma once
#include <cstdint>

#include <dsv4/fragments.cuh>

namespace dsv4::kv {

// An entry: 448 E4M3 | 64 BF16 | 7 E8M0, each for 64 channels | 1 of padding.
constexpr int DH = 512, ROPE = 64, PLAIN = DH - ROPE, SCALES = PLAIN + 2 * ROPE, ENTRY_BYTES = 584;

// Bytes of x, by their numbers; from 8 on: eight times the sign of byte number - 8.
__device__ __forceinline__ uint32_t signed_bytes(uint32_t x, uint32_t numbers) {
    uint32_t y;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "r"(numbers));
    return y;
}

// Both halves 2^(field - 127) as BF16, 0 < field < 255.
__device__ __forceinline__ uint32_t power_bf16x2(uint32_t field) { return field * 0x00800080u; }

// Four times two E4M3 codes, moved to the sign, the exponent and the mantissa of BF16: 2^120 times too small, denormals
// included.
__device__ __forceinline__ void small_bf16(uint32_t (&pairs)[4], uint2 codes) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t code = i < 2 ? codes.x : codes.y;
        pairs[i] = signed_bytes(code, i % 2 ? 0xB3A2 : 0x9180) << 4 & 0x87F087F0u;
    }
}

// What makes those the codes' values times 2^(byte - 127), the value of a scale byte; byte 255 marks a group that held
// NaN or Inf, and the code of NaN stands in such groups only. A product has four significant bits, so BF16 holds it, and
// one with a power of two is exact; from FAR on that power exceeds BF16's range: the product is taken in two steps.
constexpr uint32_t FAR = 135;
__device__ __forceinline__ uint32_t scale_near(uint32_t byte) { return power_bf16x2(byte + 120); }
__device__ __forceinline__ uint32_t scale_far(uint32_t (&pairs)[4], uint32_t byte) {
    if (byte == 255) return 0x7FFF7FFFu;
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = mul_bf16x2(pairs[i], power_bf16x2(254));
    return power_bf16x2(byte - 7);
}

__device__ __forceinline__ uint4 scaled(const uint32_t (&pairs)[4], uint32_t factor) {
    return make_uint4(mul_bf16x2(pairs[0], factor), mul_bf16x2(pairs[1], factor), mul_bf16x2(pairs[2], factor),
                      mul_bf16x2(pairs[3], factor));
}

// 8 E4M3 codes times the value of a scale byte.
__device__ __forceinline__ uint4 e4m3x8_to_bf16(uint2 codes, uint32_t byte) {
    uint32_t pairs[4];
    small_bf16(pairs, codes);
    return scaled(pairs, byte < FAR ? scale_near(byte) : scale_far(pairs, byte));
}

// The same for two groups.
__device__ __forceinline__ void e4m3x16_to_bf16(uint4 (&out)[2], uint2 low, uint2 high, uint32_t low_byte,
                                                uint32_t high_byte) {
    uint32_t pairs[2][4], factors[2] = {scale_near(low_byte), scale_near(high_byte)};
    small_bf16(pairs[0], low), small_bf16(pairs[1], high);
    if (max(low_byte, high_byte) >= FAR) {
        if (low_byte >= FAR) factors[0] = scale_far(pairs[0], low_byte);
        if (high_byte >= FAR) factors[1] = scale_far(pairs[1], high_byte);
    }
    out[0] = scaled(pairs[0], factors[0]), out[1] = scaled(pairs[1], factors[1]);
}

// Channels 8 i .. 8 i + 7 of a packed entry that starts at a multiple of 8 bytes.
__device__ __forceinline__ uint4 channels8(const uint8_t* entry, int i) {
    if (8 * i < PLAIN)
        return e4m3x8_to_bf16(reinterpret_cast<const uint2*>(entry)[i], entry[SCALES + i / 8]);
    const uint2* tail = reinterpret_cast<const uint2*>(entry + PLAIN) + 2 * (i - PLAIN / 8);
    return make_uint4(tail[0].x, tail[0].y, tail[1].x, tail[1].y);
}

}  // namespace dsv4::kv
