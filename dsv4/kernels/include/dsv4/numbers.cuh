// BF16 and float32 elements: conversion with one rounding to nearest even, and loads and stores of W elements.
#pragma once
#include <cstdint>

namespace dsv4 {

struct bf16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// Two BF16 that lie side by side.
__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// The value after a rounding to T, where the twin rounds between two operations.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
    return to_float(from_float<T>(x));
}

// Elements that one 16-byte access holds.
template <typename T>
constexpr int wide_elements = 16 / sizeof(T);

template <int BYTES>
struct Chunk {
    static_assert(BYTES % 8 == 0, "a chunk is made of 8 or 16 byte accesses");
    using type = uint2;
};
template <>
struct Chunk<16> {
    using type = uint4;
};
template <>
struct Chunk<32> {
    using type = uint4;
};

// v = p[0 .. W), zeros from p[left] on. `wide`: the caller knows that W elements are there and that p is aligned.
template <int W, typename T>
__device__ __forceinline__ void load(const T* p, float (&v)[W], int left, bool wide) {
    if (wide) {
        using C = typename Chunk<W * sizeof(T)>::type;
        constexpr int CHUNKS = W * sizeof(T) / sizeof(C), PER_CHUNK = W / CHUNKS;
        union {
            C chunk;
            T element[PER_CHUNK];
        } u;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            u.chunk = reinterpret_cast<const C*>(p)[c];
#pragma unroll
            for (int i = 0; i < PER_CHUNK; ++i) v[c * PER_CHUNK + i] = to_float(u.element[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; ++i) v[i] = i < left ? to_float(p[i]) : 0.0f;
    }
}

template <int W, typename T>
__device__ __forceinline__ void store(T* p, const float (&v)[W], int left, bool wide) {
    if (wide) {
        using C = typename Chunk<W * sizeof(T)>::type;
        constexpr int CHUNKS = W * sizeof(T) / sizeof(C), PER_CHUNK = W / CHUNKS;
        union {
            C chunk;
            T element[PER_CHUNK];
        } u;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
            for (int i = 0; i < PER_CHUNK; ++i) u.element[i] = from_float<T>(v[c * PER_CHUNK + i]);
            reinterpret_cast<C*>(p)[c] = u.chunk;
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; ++i)
            if (i < left) p[i] = from_float<T>(v[i]);
    }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

}  // namespace dsv4
