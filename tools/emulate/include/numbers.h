// FP16, BF16 and E4M3 as bits, with one rounding to nearest even.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulate {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float from_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    if (x != x) return 0x7FFF;
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float make_from_f16(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return float_of(sign | 0x7F800000 | mantissa << 13);
    if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline float from_f16(uint16_t bits) {
    static const float* values = [] {
        static float made[65536];
        for (int i = 0; i < 65536; ++i) made[i] = make_from_f16(static_cast<uint16_t>(i));
        return made;
    }();
    return values[bits];
}
inline uint16_t to_f16(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFF;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (magnitude > 0x7F800000) return 0x7FFF;
    if (magnitude >= 0x477FF000) return sign | 0x7C00;
    if (magnitude < 0x38800000)  // a multiple of 2^-24: adding 0.5 rounds to that
        return sign | static_cast<uint16_t>(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
    return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13);
}

inline float from_e4m3(uint8_t byte) {
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    if ((byte & 0x7F) == 0x7F) return float_of(0x7FFFFFFF);
    const float magnitude = exponent == 0 ? mantissa * 0x1p-9f : std::ldexp(1.0f + mantissa / 8.0f, exponent - 7);
    return byte & 0x80 ? -magnitude : magnitude;
}
// What is larger than 448 becomes 448.
inline uint8_t to_e4m3(float x) {
    const uint8_t sign = bits_of(x) >> 24 & 0x80;
    const float magnitude = std::fabs(x);
    if (x != x) return 0x7F;
    if (magnitude >= 448.0f) return sign | 0x7E;
    int exponent;
    std::frexp(magnitude, &exponent);
    const int step = std::max(exponent - 4, -9);  // a place of the last digit, as a power of two
    const float places = std::nearbyint(std::ldexp(magnitude, -step));
    const float rounded = std::ldexp(places, step);
    if (rounded < 0x1p-6f) return sign | static_cast<uint8_t>(std::ldexp(rounded, 9));
    const float fraction = std::frexp(rounded, &exponent);
    return sign | static_cast<uint8_t>((exponent + 6) << 3 | (static_cast<int>(fraction * 16.0f) - 8));
}

inline uint32_t pair(uint16_t low, uint16_t high) { return static_cast<uint32_t>(high) << 16 | low; }

}  // namespace emulate
