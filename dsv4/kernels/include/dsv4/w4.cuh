// NVFP4 weights as A operands. The layout is that of kernels/tiles.py: a block of 16 rows x 64 columns is 576 bytes, 512
// of codes (16 a lane: one word per product) and 64 of E4M3 scales (2 a lane: rows g and g + 8, the group of columns
// 16 t .. 16 t + 15). K is permuted inside a block only: product j holds the columns 16 t + 4 j .. 16 t + 4 j + 3 of each
// t, so B is 16 contiguous columns of a token per lane (mma.cuh). Tiles of 16 rows follow one another, each K/64 blocks.
//
// A code is sign and magnitude (exponent 2, mantissa 1); as FP16 it is those bits at 15 and 11..9, the value x 2^-14,
// denormals included. A word holds the codes of registers 0..3 in each 16 bit half so that 0 needs one mask, 1 a shift
// and a mask, 2 and 3 a mask, a multiplication that moves sign and magnitude at once, and a mask: 9 instructions for 8
// weights, no conversion. Code x scale is exact in FP16: at most 6 bits, multiples of 2^-24, at most 2688 x 2^-14.
// The accumulator is UNDO times too small, and has still to be multiplied by the matrix's global.
#pragma once
#include <cstdint>

namespace dsv4::w4 {

constexpr int BLOCK_BYTES = 576, CODE_BYTES = 512;
constexpr float UNDO = 16384.0f;  // 2^14

__device__ __forceinline__ uint32_t mul_f16x2(uint32_t x, uint32_t y) {
    uint32_t z;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

// Two E4M3 bytes to FP16, exactly: the low byte to the low half.
__device__ __forceinline__ uint32_t e4m3x2_to_f16x2(uint16_t bytes) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(bytes));
    return halves;
}

// A lane's part of a block.
struct Lane {
    uint4 codes;      // one word per product
    uint16_t scales;  // E4M3 of row g (low byte) and row g + 8
};

// Of the codes and scales of all lanes; or of those from the lane's own on, where the lane has been added to both.
__device__ __forceinline__ Lane load(const uint8_t* codes, const uint8_t* scales, int lane = 0) {
    Lane part;
    part.codes = reinterpret_cast<const uint4*>(codes)[lane];
    part.scales = reinterpret_cast<const uint16_t*>(scales)[lane];
    return part;
}
__device__ __forceinline__ Lane load(const uint8_t* block, int lane) { return load(block, block + CODE_BYTES, lane); }

// The scales of rows g and g + 8, each in both halves: said in such a way that no instruction is needed.
__device__ __forceinline__ void scales(uint16_t bytes, uint32_t& row_g, uint32_t& row_g8) {
    const uint32_t both = e4m3x2_to_f16x2(bytes);
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; mov.b32 %0, {low, low}; mov.b32 %1, {high, high};}"
        : "=r"(row_g), "=r"(row_g8)
        : "r"(both));
}

// A of one product: its codes times their scales, x 2^-14.
__device__ __forceinline__ void dequantize(uint32_t (&a)[4], uint32_t word, uint32_t row_g, uint32_t row_g8) {
    constexpr uint32_t VALUE = 0x8E008E00u;
    const uint32_t c0 = word & VALUE;
    const uint32_t c1 = (word << 3) & VALUE;
    const uint32_t c2 = (word & 0x40384038u) * 66u & VALUE;   // << 1 for the sign, << 6 for the magnitude
    const uint32_t c3 = (word & 0x20072007u) * 516u & VALUE;  // << 2 and << 9
    a[0] = mul_f16x2(c0, row_g);
    a[1] = mul_f16x2(c1, row_g8);
    a[2] = mul_f16x2(c2, row_g);
    a[3] = mul_f16x2(c3, row_g8);
}

}  // namespace dsv4::w4
