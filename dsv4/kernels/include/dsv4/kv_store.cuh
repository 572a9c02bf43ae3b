// The end of a KV entry's or an index key's making, by one warp: norm, RoPE, Hadamard, rounding, and the bytes of
// dsv4/quant/kv.py. Lane l holds channels (32 * it + l) * 8 .. + 7 for it < ITER; channels from n on are zero.
// `wide`: n is a multiple of 8 and rows start at one of 16 bytes. WHOLE: that is known when the code is compiled, and
// the number of rotated channels is a multiple of 8 too, and not 0.
#pragma once
#include <dsv4/formats.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/reduce.cuh>
#include <dsv4/rope.cuh>

namespace dsv4::kv_store {

constexpr unsigned ALL = 0xffffffffu;

// What a row of n channels becomes: an entry or an index key, as codes or as values.
struct Form {
    const float* weight;  // of the norm
    const float2* turn;
    int n, dims, bytes;  // dims: rotated channels; bytes: of a packed row
    float eps, factor;   // factor: n^-0.5 of an index key's Hadamard transform
    bool wide, rounds, packed, index;
};

template <int ITER>
struct Row {
    float v[ITER][8];      // values, after the last rounding
    uint2 codes[ITER];     // 8 E4M3 codes; an index key's 8 E2M1 codes in x
    uint32_t scale[ITER];  // E8M0 byte of the channels' group
};

__device__ __forceinline__ int channel(int it) { return (32 * it + static_cast<int>(threadIdx.x % 32)) * 8; }

// Largest magnitude, as bits so that NaN is kept, over 2^k neighbouring lanes.
template <int LANES>
__device__ __forceinline__ uint32_t group_amax_bits(const float (&v)[8]) {
    uint32_t amax = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) amax = max(amax, magnitude_bits(v[k]));
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) amax = max(amax, __shfl_xor_sync(ALL, amax, step));
    return amax;
}

// E8M0 byte of a power of two; 255 for a group that holds NaN or Inf.
__device__ __forceinline__ uint32_t scale_byte(uint32_t amax, float scale) {
    return amax >= EXPONENT ? 255u : __float_as_uint(scale) >> 23;
}
__device__ __forceinline__ float scale_value(uint32_t byte) {
    return __uint_as_float(byte == 255 ? 0x7fffffffu : byte << 23);
}
__device__ __forceinline__ float inverse(uint32_t byte) { return __uint_as_float((254 - min(byte, 254u)) << 23); }

// v = channels i .. i + 7 of a row of n.
template <bool WHOLE, typename T>
__device__ __forceinline__ void load_channels(const T* row, float (&v)[8], int i, int n, bool wide) {
    if (!WHOLE) {
        load<8>(row + i, v, n - i, wide && i < n);
    } else if (i < n) {
        load<8>(row + i, v, 8, true);
    } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = 0.0f;
    }
}

template <typename T, bool WHOLE = false, int ITER>
__device__ void norm_rope(float (&v)[ITER][8], const float* weight, const float2* turn, int n, int dims, float eps,
                          bool wide) {
    float sum = 0.0f, w[ITER][8];
    float2 c[ITER][4];
    const auto turns = [&](int i, int k) {  // channels i + k and the next; WHOLE: the eight from i on do, or none of them
        return WHOLE ? i >= n - dims && i < n : i + k >= n - dims && i + k < n;
    };
#pragma unroll
    for (int it = 0; it < ITER; ++it) {  // all loads before the sum is waited for
        const int i = channel(it);
        load_channels<WHOLE>(weight, w[it], i, n, wide);
        const int rotated = i - (n - dims);  // WHOLE: lanes without a rotation read the first ones
#pragma unroll
        for (int k = 0; k < 8; k += 2)
            if (WHOLE || turns(i, k)) c[it][k / 2] = turn[((!WHOLE || turns(i, k) ? rotated : 0) + k) / 2];
    }
#pragma unroll
    for (int it = 0; it < ITER; ++it)
#pragma unroll
        for (int k = 0; k < 8; ++k) sum = fmaf(v[it][k], v[it][k], sum);
    const float root = rsqrtf(warp_sum(sum) / static_cast<float>(n) + eps);
#pragma unroll
    for (int it = 0; it < ITER; ++it) {
        const int i = channel(it);
#pragma unroll
        for (int k = 0; k < 8; ++k) v[it][k] = rounded<T>(v[it][k] * root * w[it][k]);
#pragma unroll
        for (int k = 0; k < 8; k += 2)
            if (turns(i, k)) {
                rotate(v[it][k], v[it][k + 1], c[it][k / 2]);
                v[it][k] = rounded<T>(v[it][k]);
                v[it][k + 1] = rounded<T>(v[it][k + 1]);
            }
    }
}

// E4M3 in groups of 64 of the channels before the rotated ones, whose number is a multiple of 64: codes, scales and, if
// asked for, values.
template <int ITER>
__device__ void round_entry(Row<ITER>& row, int plain, bool values) {
#pragma unroll
    for (int it = 0; it < ITER; ++it) {
        const uint32_t amax = group_amax_bits<8>(row.v[it]);
        if (channel(it) >= plain) continue;  // a whole group of 8 lanes, which have met above
        const uint32_t byte = row.scale[it] = scale_byte(amax, fp8_scale(amax));
        uint32_t words[2] = {0, 0};
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const uint32_t code = e4m3_encode(row.v[it][k] * inverse(byte));
            words[k / 4] |= code << 8 * (k % 4);
        }
        row.codes[it] = make_uint2(words[0], words[1]);
        if (!values) continue;
#pragma unroll
        for (int k = 0; k < 8; ++k)
            row.v[it][k] = e4m3_value(static_cast<uint8_t>(words[k / 4] >> 8 * (k % 4))) * scale_value(byte);
    }
}

// Hadamard over n = 2^k channels, 32 <= n <= 256, then E2M1 in groups of 32. factor = n^-0.5.
template <typename T, int ITER>
__device__ void round_index_key(Row<ITER>& row, int n, float factor) {
    float(&v)[8] = row.v[0];
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
#pragma unroll
        for (int k = 0; k < 8; ++k)
            if ((k & step) == 0) {
                const float a = v[k], b = v[k + step];
                v[k] = a + b;
                v[k + step] = a - b;
            }
#pragma unroll 1
    for (int step = 1; step < n / 8; step *= 2) {
        const float sign = threadIdx.x & step ? -1.0f : 1.0f;
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = fmaf(sign, v[k], __shfl_xor_sync(ALL, v[k], step));
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = rounded<T>(v[k] * factor);
    const uint32_t amax = group_amax_bits<4>(v);
    const float largest = __fmul_rn(at_least(__uint_as_float(amax), 6 * 0x1p-126f), static_cast<float>(1.0 / 6.0));
    const float scale = __uint_as_float((__float_as_uint(largest) + MANTISSA) & EXPONENT);
    const uint32_t byte = row.scale[0] = scale_byte(amax, scale);
    row.codes[0] = make_uint2(0, 0);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const uint32_t code = e2m1_encode(fabsf(v[k]) * inverse(byte)), sign = __float_as_uint(v[k]) & SIGN;
        row.codes[0].x |= (code | sign >> 28) << 4 * k;
        v[k] = __uint_as_float(__float_as_uint(e2m1_value(code) * scale_value(byte)) | sign);
    }
}

// A row of n values in T at `to`.
template <typename T, bool WHOLE = false, int ITER>
__device__ void store_values(const Row<ITER>& row, T* to, int n, bool wide) {
#pragma unroll
    for (int it = 0; it < ITER; ++it) {
        const int i = channel(it);
        if (i < n) store<8>(to + i, row.v[it], n - i, WHOLE || wide);
    }
}

// The bytes of an entry at `to`, a multiple of 8: codes | BF16 tail | scales | zeros.
template <bool WHOLE = false, int ITER>
__device__ void store_entry(const Row<ITER>& row, uint8_t* to, int n, int dims, int bytes) {
    const int plain = n - dims, scales = plain + 2 * dims;
#pragma unroll
    for (int it = 0; it < ITER; ++it) {
        const int i = channel(it);
        if (i < plain) {
            *reinterpret_cast<uint2*>(to + i) = row.codes[it];
            if (threadIdx.x % 8 == 0) to[scales + i / 64] = static_cast<uint8_t>(row.scale[it]);
        } else if (i < n) {
            bf16* tail = reinterpret_cast<bf16*>(to + plain) + (i - plain);
            alignas(16) bf16 element[8];
#pragma unroll
            for (int k = 0; k < 8; ++k) element[k] = from_float<bf16>(row.v[it][k]);
            if (WHOLE || i + 8 <= n) {
                reinterpret_cast<uint2*>(tail)[0] = reinterpret_cast<uint2*>(element)[0];
                reinterpret_cast<uint2*>(tail)[1] = reinterpret_cast<uint2*>(element)[1];
            } else {
#pragma unroll
                for (int k = 0; k < 8; ++k)
                    if (i + k < n) tail[k] = element[k];
            }
        }
    }
#pragma unroll 1
    for (int i = scales + plain / 64 + threadIdx.x % 32; i < bytes; i += 32) to[i] = 0;
}

// The bytes of an index key at `to`: codes | scales. Keys of 32 or 64 channels are 17 or 34 bytes: no words in them.
template <int ITER>
__device__ __forceinline__ void store_index_key(const Row<ITER>& row, uint8_t* to, int n) {
    const int i = channel(0);
    if (i >= n) return;
    if (n % 128 == 0) {
        reinterpret_cast<uint32_t*>(to)[i / 8] = row.codes[0].x;
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) to[i / 2 + k] = static_cast<uint8_t>(row.codes[0].x >> 8 * k);
    }
    if (threadIdx.x % 4 == 0) to[n / 2 + i / 32] = static_cast<uint8_t>(row.scale[0]);
}

template <typename T, bool WHOLE, int ITER>
__device__ __forceinline__ void make(Row<ITER>& row, const Form& form) {
    norm_rope<T, WHOLE>(row.v, form.weight, form.turn, form.n, form.dims, form.eps, form.wide);
    if (!form.rounds) return;
    if (form.index)
        round_index_key<T>(row, form.n, form.factor);
    else
        round_entry(row, form.n - form.dims, !form.packed);
}

// Row `at` of `rows`.
template <typename T, bool WHOLE, int ITER>
__device__ __forceinline__ void put(const Row<ITER>& row, const Form& form, void* rows, int64_t at) {
    uint8_t* bytes = static_cast<uint8_t*>(rows) + at * form.bytes;
    if (!form.packed)
        store_values<T, WHOLE>(row, static_cast<T*>(rows) + at * form.n, form.n, form.wide);
    else if (form.index)
        store_index_key(row, bytes, form.n);
    else
        store_entry<WHOLE>(row, bytes, form.n, form.dims, form.bytes);
}

}  // namespace dsv4::kv_store
