// Index keys as B operands of mma.m16n8k16 over 128 channels: lane (g, t) holds channels 32 t .. 32 t + 31 of key g, one
// group of the packed form. Product s (0 .. 7) takes from each lane channels 32 t + 4 s + {0, 1} in b[2 s] and {2, 3} in
// b[2 s + 1]; the order of channels is free as long as queries come in the same one.
#pragma once
#include <cstdint>

#include <dsv4/fragments.cuh>

namespace dsv4::index {

constexpr int WIDTH = 128, PAGE = 64, PACKED_BYTES = WIDTH / 2 + WIDTH / 32, PLAIN_BYTES = WIDTH * 2;

// A code is sign, two exponent bits and one of mantissa; as the top bits of a BF16 its value x 2^-126, denormals included.
__device__ __forceinline__ uint32_t codes_to_bf16x2(uint32_t at_bits_12_and_28) {
    const uint32_t value = (at_bits_12_and_28 & 0x80008000u) | (at_bits_12_and_28 >> 6 & 0x01C001C0u);
    return mul_bf16x2(value, 0x7E807E80u);  // 2^126
}

// Eight channels, the even one of a byte low, times a power of two (both halves of `scale`): four pairs.
__device__ __forceinline__ void unpack8(uint32_t (&pairs)[4], uint32_t codes, uint32_t scale) {
    const uint32_t even = codes & 0x0F0F0F0Fu, odd = codes >> 4 & 0x0F0F0F0Fu;
    const uint32_t sorted = __byte_perm(even | even >> 4, odd | odd >> 4, 0x6420);  // 0 2 4 6 | 1 3 5 7
#pragma unroll
    for (int p = 0; p < 4; ++p) pairs[p] = mul_bf16x2(codes_to_bf16x2(sorted << (12 - 4 * p)), scale);
}

// A lane's share of a packed key as it lies in memory.
struct PackedShare {
    uint32_t codes[4], exponent;
};

constexpr PackedShare NO_KEY = {{0, 0, 0, 0}, 127};

__device__ __forceinline__ PackedShare fetch_packed(const uint8_t* key, int t) {
    const uint32_t* codes = reinterpret_cast<const uint32_t*>(key) + 4 * t;
    return {{codes[0], codes[1], codes[2], codes[3]}, key[WIDTH / 2 + t]};
}

__device__ __forceinline__ void unpack(uint32_t (&b)[16], const PackedShare& key) {
    const uint32_t exponent = key.exponent;
    const uint32_t bits = exponent == 0 ? 0x0040u : exponent == 255 ? 0x7FFFu : exponent << 7;  // 255: it held NaN
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        uint32_t pairs[4];
        unpack8(pairs, key.codes[word], bits | bits << 16);
#pragma unroll
        for (int p = 0; p < 4; ++p) b[4 * word + p] = pairs[p];
    }
}

__device__ __forceinline__ void load_plain(uint32_t (&b)[16], const uint8_t* key, int t) {
    const uint4* channels = reinterpret_cast<const uint4*>(key) + 4 * t;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint4 x = channels[i];
        b[4 * i] = x.x, b[4 * i + 1] = x.y, b[4 * i + 2] = x.z, b[4 * i + 3] = x.w;
    }
}

}  // namespace dsv4::index
