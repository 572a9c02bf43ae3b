// m16n8k16 products with float32 accumulators. Lane (g, t) = (lane / 4, lane % 4):
//   A, weights   a[i], half h: row g + 8 (i % 2),  slot 2 t + 8 (i / 2) + h
//   B, tokens    b[p], half h: token g,            slot 2 t + 8 p + h
//   C            c[i]:         row g + 8 (i / 2),  token 2 t + i % 2
// The four slots of t carry the columns 16 t + 4 j .. 16 t + 4 j + 3 of a 64 column block in product j (kernels/tiles.py)
// on both sides: the order of columns inside a block is free as long as A and B agree. B is then 16 columns of one
// token, 32 contiguous bytes, for the four products of a block.
#pragma once
#include <cstdint>

namespace dsv4 {

__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// b[2 j], b[2 j + 1]: B of product j, out of 16 columns (32 bytes, aligned to 16) of one token.
__device__ __forceinline__ void load_b(uint32_t (&b)[8], const void* columns) {
    const uint4* p = static_cast<const uint4*>(columns);
    const uint4 x = p[0], y = p[1];
    b[0] = x.x, b[1] = x.y, b[2] = x.z, b[3] = x.w;
    b[4] = y.x, b[5] = y.y, b[6] = y.z, b[7] = y.w;
}

}  // namespace dsv4
