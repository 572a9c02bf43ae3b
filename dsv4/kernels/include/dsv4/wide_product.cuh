// 16-row tiles, in registers as mma.cuh has them, times up to 128 tokens in shared memory. On Hopper four warps multiply
// together (wgmma: the fragments of a warp are its 16 rows of the 64), as many products in flight as the caller allows;
// elsewhere each warp multiplies by itself, and nothing is in flight.
//
// A step of the tokens is 128 bytes of each: 64 columns, product j at bytes 32 j .. 32 j + 31, where half s is slot s of
// mma.cuh. Pieces of 16 bytes are swizzled: piece p of token n lies at 128 n + 16 (p ^ n % 8), steps at multiples of 1024.
#pragma once
#include <dsv4/mma.cuh>

namespace dsv4::wide {

constexpr int MOST_TILES = 16;  // of eight tokens

// The pair of columns of a block of 64 that lies at pair `at` of a step: slot 8 p + 2 t + h of product j is column
// 16 t + 4 j + 2 p + h.
__host__ __device__ __forceinline__ int column_pair(int at) { return at % 4 * 8 + at / 8 * 2 + at / 4 % 2; }

__device__ __forceinline__ uint32_t piece_at(int token, int piece) { return token * 128 + (piece ^ token % 8) * 16; }

// B of the products 2 h (b[0], b[1]) and 2 h + 1 with tokens 8 n .. 8 n + 7 of the step at `step`, a shared address.
__device__ __forceinline__ void load_tokens(uint32_t (&b)[4], uint32_t step, int n, int h) {
    const int lane = threadIdx.x % 32;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(step + n * 1024 + piece_at(lane % 8, 4 * h + lane / 8))
                 : "memory");
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// At most so many groups of products, each of one `multiply`, are in flight.
template <int PENDING>
__device__ __forceinline__ void settle() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// One product of 64 rows; `tokens` describes B.
template <int NT>
__device__ __forceinline__ void product(float (&c)[NT][4], const uint32_t (&a)[4], uint64_t tokens);

#define DSV4_SUMS(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define DSV4_SUMS_16 DSV4_SUMS(0), DSV4_SUMS(1)
#define DSV4_SUMS_32 DSV4_SUMS_16, DSV4_SUMS(2), DSV4_SUMS(3)
#define DSV4_SUMS_48 DSV4_SUMS_32, DSV4_SUMS(4), DSV4_SUMS(5)
#define DSV4_SUMS_64 DSV4_SUMS_48, DSV4_SUMS(6), DSV4_SUMS(7)
#define DSV4_SUMS_80 DSV4_SUMS_64, DSV4_SUMS(8), DSV4_SUMS(9)
#define DSV4_SUMS_96 DSV4_SUMS_80, DSV4_SUMS(10), DSV4_SUMS(11)
#define DSV4_SUMS_112 DSV4_SUMS_96, DSV4_SUMS(12), DSV4_SUMS(13)
#define DSV4_SUMS_128 DSV4_SUMS_112, DSV4_SUMS(14), DSV4_SUMS(15)
#define DSV4_LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DSV4_LIST_32 DSV4_LIST_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define DSV4_LIST_48 DSV4_LIST_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define DSV4_LIST_64 DSV4_LIST_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define DSV4_LIST_80 DSV4_LIST_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define DSV4_LIST_96 DSV4_LIST_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define DSV4_LIST_112 DSV4_LIST_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define DSV4_LIST_128 DSV4_LIST_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define DSV4_PRODUCT(TOKENS, A, DESCRIPTION)                                                                    \
    template <>                                                                                                 \
    __device__ __forceinline__ void product<TOKENS / 8>(float (&c)[TOKENS / 8][4], const uint32_t (&a)[4],        \
                                                        uint64_t tokens) {                                      \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #TOKENS    \
                     "k16.f32.f16.f16 {" DSV4_LIST_##TOKENS "}, {" A "}, " DESCRIPTION ", add, 1, 1, 0;\n}"      \
                     : DSV4_SUMS_##TOKENS                                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens));                                \
    }
DSV4_PRODUCT(16, "%8, %9, %10, %11", "%12")
DSV4_PRODUCT(32, "%16, %17, %18, %19", "%20")
DSV4_PRODUCT(48, "%24, %25, %26, %27", "%28")
DSV4_PRODUCT(64, "%32, %33, %34, %35", "%36")
DSV4_PRODUCT(80, "%40, %41, %42, %43", "%44")
DSV4_PRODUCT(96, "%48, %49, %50, %51", "%52")
DSV4_PRODUCT(112, "%56, %57, %58, %59", "%60")
DSV4_PRODUCT(128, "%64, %65, %66, %67", "%68")

// sums += products 2 h and 2 h + 1 of a block: of each tile, times the first 8 NT tokens of the step at `step`, a shared
// address. What other threads have written there is visible after `publish` by them and a barrier.
template <int NT, int TILES>
__device__ __forceinline__ void multiply(float (&sums)[TILES][NT][4], const uint32_t (&a)[TILES][2][4],
                                         uint32_t step, int h) {
    // 128-byte swizzle, groups of eight tokens 1024 bytes apart
    constexpr uint64_t UPPER = uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32;
    const uint32_t tokens = 1 << 16 | step >> 4;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < TILES; ++i) product<NT>(sums[i], a[i][j], UPPER | (tokens + (2 * h + j) * 2));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// After settle<0>: from here on the sums may be read.
template <int NT, int TILES>
__device__ __forceinline__ void take(float (&sums)[TILES][NT][4]) {
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int k = 0; k < 4; ++k) asm volatile("" : "+f"(sums[i][n][k])::"memory");
}

#else

template <int PENDING>
__device__ __forceinline__ void settle() {}

template <int NT, int TILES>
__device__ __forceinline__ void multiply(float (&sums)[TILES][NT][4], const uint32_t (&a)[TILES][2][4],
                                         uint32_t step, int h) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        uint32_t b[4];
        load_tokens(b, step, n, h);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < TILES; ++i) mma_f16(sums[i][n], a[i][j], b[2 * j], b[2 * j + 1]);
    }
}

__device__ __forceinline__ void publish() {}

template <int NT, int TILES>
__device__ __forceinline__ void take(float (&)[TILES][NT][4]) {}

#endif

}  // namespace dsv4::wide
