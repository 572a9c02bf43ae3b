// Weights in tensor-core order (kernels/tiles.py) times tokens: parts and rings, and what a warp does with a slice of a
// tile where tokens are few.
//
// A slice is 512 columns, eight blocks. Its products are added up by the tensor cores, block after block; the slices of
// a row are then added up in their order, in float32. Who computes which slice does not enter: a result has the same
// bits however the work is spread and whatever tokens are beside it.
#pragma once
#include <dsv4/activations.cuh>
#include <dsv4/bulk.cuh>
#include <dsv4/fragments.cuh>
#include <dsv4/launch.cuh>
#include <dsv4/mma.cuh>
#include <dsv4/w4.cuh>

namespace dsv4::linear {

constexpr int TILE_ROWS = 16, BLOCK_COLUMNS = 64, SLICE_BLOCKS = SLICE / BLOCK_COLUMNS;
constexpr int SLICE_SCALES = SLICE / 128;  // of FP8
constexpr int CHUNK = 2304;  // bytes of a stage of a warp's ring: 4 NVFP4 blocks, 2 of FP8 or 1 of BF16
constexpr int MAX_PARTS = 16, MAX_GRID = 256;

enum Format : int { NVFP4 = 0, FP8 = 1, PLAIN = 2 };  // the codes of kernels/linear/launch.py

// One projection. The mirror of its ctypes structure in kernels/linear/launch.py.
struct Part {
    const uint8_t* tiles;
    const float* block_scale;  // FP8: [ceil(N / 128), scale_columns]
    const bf16* x;             // rows x_stride apart
    const float* row_scale;    // [T], row_scale_stride apart, or null
    void* out;                 // [T, N] rows out_stride apart
    int64_t x_stride, out_stride;
    float alpha;
    int format, rows, out_f32;
    int first_tile;     // tiles of the parts before this one
    int first_row;      // of block_scale: where this part begins in the matrix it was cut from
    int scale_columns;  // ceil(K / 128)
    int x_wide;         // x may be read 16 bytes at a time
    int row_scale_stride;
    int input;  // parts with equal x, whose weights are equally BF16 or not, have the same
};

static_assert(sizeof(Part) == 96, "kernels/linear/launch.py lays it out");

struct Parts {
    Part part[MAX_PARTS];
    int count, tiles;  // tiles: of all parts
};

__device__ __forceinline__ int block_bytes(int format) { return format == NVFP4 ? 576 : format == FP8 ? 1024 : 2048; }
__device__ __forceinline__ int chunk_blocks(int format) { return format == NVFP4 ? 4 : format == FP8 ? 2 : 1; }

// A warp's ring of stages in shared memory, each a chunk of every tile it multiplies at once.
template <int TILES>
struct Ring {
    static constexpr int STAGE = TILES * CHUNK;
    uint32_t data, full;  // shared addresses: [stages][TILES][CHUNK], [stages] barriers
    const uint8_t* bytes;
    int stages, at;
    uint32_t parity;
    bool live = true;  // else what lies at `bytes` will do

    __device__ __forceinline__ const uint8_t* byte(int offset) const { return bytes + (at * STAGE + offset); }
    __device__ __forceinline__ const uint8_t* wait() const {
        if (live) barrier_wait(full + at * 8, parity);
        return byte(0);
    }
    __device__ __forceinline__ void advance() {
        if (++at == stages) at = 0, parity ^= 1;
    }
};

// Rounds once and stores. y: the sum over all slices.
__device__ __forceinline__ void put(const Part& part, int row, int token, float y) {
    if (row >= part.rows) return;
    y *= part.alpha;
    if (part.row_scale != nullptr) y *= part.row_scale[token * part.row_scale_stride];
    const int64_t at = token * part.out_stride + row;
    if (part.out_f32) static_cast<float*>(part.out)[at] = y;
    else static_cast<bf16*>(part.out)[at] = from_float<bf16>(y);
}

// The transposed 8 x 8 matrix of 16 bit values, of which a lane holds the columns 2 t and 2 t + 1 of row g = lane / 4.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
    uint32_t other;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(other) : "r"(pair));
    return other;
}

// Whether all rows of the tile that begins at `row` may be stored as Eight does it.
__device__ __forceinline__ bool whole_rows(const Part& part, int row) {
    return !part.out_f32 && row + TILE_ROWS <= part.rows && part.out_stride % 4 == 0 &&
           reinterpret_cast<uintptr_t>(part.out) % 8 == 0;
}

// `put` of what a warp holds of a tile and eight tokens, in the order of the accumulators (rows g and g + 8, tokens 2 t and
// 2 t + 1), as BF16: a lane stores four rows of token g, and a token's sixteen are one sector.
struct Eight {
    const Part& part;
    float alpha;  // 1 once sums have been scaled
    int tokens;
    bf16* to;  // of token g of the first eight

    __device__ __forceinline__ Eight(const Part& part, int row, int tokens)
        : part(part), alpha(part.row_scale == nullptr ? part.alpha : 1.0f), tokens(tokens),
          to(static_cast<bf16*>(part.out) + threadIdx.x % 32 / 4 * part.out_stride + row + threadIdx.x % 2 * 8 +
             threadIdx.x % 4 / 2 * 4) {}
    // Before tokens `first` .. `first` + 7 are put, if rows have scales of their own.
    __device__ __forceinline__ void scale(int first, float (&sum)[4]) const {
        if (part.row_scale == nullptr) return;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = min(first + static_cast<int>(threadIdx.x % 4) * 2 + i % 2, tokens - 1);
            sum[i] = sum[i] * part.alpha * part.row_scale[token * part.row_scale_stride];
        }
    }
    __device__ __forceinline__ void put(int first, const float (&sum)[4]) const {
        const int lane = threadIdx.x % 32;
        const uint32_t low = transposed(bf16x2(sum[0] * alpha, sum[1] * alpha));  // now of token g: rows of the first eight
        const uint32_t high = transposed(bf16x2(sum[2] * alpha, sum[3] * alpha));
        const bool upper = lane % 2;
        const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, upper ? low : high, 1);
        if (first + lane / 4 < tokens)
            *reinterpret_cast<uint2*>(to + first * part.out_stride) =
                upper ? make_uint2(other, high) : make_uint2(low, other);
    }
};

// Where a lane's columns of up to eight staged tokens lie, beyond those of its slice: of token g. Only the tokens there are take space, and the others
// read the last one.
__device__ __forceinline__ int lane_columns(int tokens, int stride) {
    const int lane = threadIdx.x % 32;
    return min(lane / 4, tokens - 1) * stride + lane % 4 * 32;
}

// A of a block's four products, of what the lane has of it. NVFP4: x 2^-14; FP8: before its block scale.
__device__ __forceinline__ void nvfp4_operands(uint32_t (&a)[4][4], const w4::Lane& part) {
    const uint32_t words[4] = {part.codes.x, part.codes.y, part.codes.z, part.codes.w};
    uint32_t scale_g, scale_g8;
    w4::scales(part.scales, scale_g, scale_g8);
#pragma unroll
    for (int j = 0; j < 4; ++j) w4::dequantize(a[j], words[j], scale_g, scale_g8);
}

__device__ __forceinline__ void fp8_operands(uint32_t (&a)[4][4], const uint8_t* codes) {
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
        const uint4 own = *reinterpret_cast<const uint4*>(codes + piece * 512);
        const uint32_t words[4] = {own.x, own.y, own.z, own.w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            uint32_t(&to)[4] = a[2 * piece + w / 2];
            to[2 * (w % 2)] = w4::e4m3x2_to_f16x2(static_cast<uint16_t>(words[w]));
            to[2 * (w % 2) + 1] = w4::e4m3x2_to_f16x2(static_cast<uint16_t>(words[w] >> 16));
        }
    }
}

__device__ __forceinline__ void plain_operands(uint32_t (&a)[4][4], const uint8_t* codes) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const uint4 values = *reinterpret_cast<const uint4*>(codes + j * 512);
        a[j][0] = values.x, a[j][1] = values.y, a[j][2] = values.z, a[j][3] = values.w;
    }
}

// sum += a block of each tile, whose operands are `a`, times up to eight tokens; x: the lane's columns, see lane_columns.
template <int FORMAT, int TILES>
__device__ __forceinline__ void block_product(float (&sum)[TILES][4], const uint32_t (&a)[TILES][4][4], const uint8_t* x) {
    uint32_t b[8];
    load_b(b, x);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < TILES; ++i)
            if constexpr (FORMAT == PLAIN) mma_bf16(sum[i], a[i][j], b[2 * j], b[2 * j + 1]);
            else mma_f16(sum[i], a[i][j], b[2 * j], b[2 * j + 1]);
}

template <int TILES>
__device__ __forceinline__ void nvfp4_block(float (&sum)[TILES][4], const uint8_t* codes, const uint8_t* scales,
                                            const uint8_t* x) {
    uint32_t a[TILES][4][4];
#pragma unroll
    for (int i = 0; i < TILES; ++i) nvfp4_operands(a[i], w4::load(codes + i * CHUNK, scales + i * CHUNK));
    block_product<NVFP4>(sum, a, x);
}

template <int TILES>
__device__ __forceinline__ void plain_block(float (&sum)[TILES][4], const uint8_t* codes, const uint8_t* x) {
    uint32_t a[TILES][4][4];
#pragma unroll
    for (int i = 0; i < TILES; ++i) plain_operands(a[i], codes + i * CHUNK);
    block_product<PLAIN>(sum, a, x);
}

template <int TILES>
__device__ __forceinline__ void fp8_product(float (&sum)[TILES][4], const uint32_t (&a)[TILES][4][4], const uint8_t* x,
                                            const float (&scale)[TILES]) {
    float part[TILES][4] = {};
    block_product<FP8>(part, a, x);
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[i][k] = fmaf(part[i][k], scale[i], sum[i][k]);
}

template <int TILES>
__device__ __forceinline__ void fp8_block(float (&sum)[TILES][4], const uint8_t* codes, const uint8_t* x,
                                          const float (&scale)[TILES]) {
    uint32_t a[TILES][4][4];
#pragma unroll
    for (int i = 0; i < TILES; ++i) fp8_operands(a[i], codes + i * CHUNK);
    fp8_product(sum, a, x, scale);
}

// FP8: the scale of 128 columns of a tile of a part, which are its `column`-th; 0 where there are none.
__device__ __forceinline__ float scale_of(const Part& part, int tile, int column) {
    const int row = (part.first_row + tile * TILE_ROWS) / 128;
    return column < part.scale_columns ? part.block_scale[row * part.scale_columns + column] : 0.0f;
}

// How many blocks make a chunk that slice_product multiplies without a loop.
__device__ __forceinline__ int least_of(int format) { return format == NVFP4 ? 4 : SLICE_BLOCKS + 1; }

// sum += a slice, of which `left` blocks are left, of `tiles` tiles of `format`, times up to eight tokens. x: the lane's
// columns of the staged slice, from those blocks on. least: least_of the format. scales(scale, left): of FP8, those of the
// next two blocks of each tile, when so many are left. The caller refills the ring, a Ring or what is like it, after each
// chunk: through next(), or, behind four blocks of NVFP4, through quickly() where that is true.
// Where fewer tiles are left than a warp multiplies at once, what the ring holds in the place of the others reaches only
// sums that nobody takes. EIGHT: there are FP8 weights.
template <int TILES, bool EIGHT = true, typename Scales, typename Ring, typename Quickly, typename Next>
__device__ __forceinline__ void slice_product(float (&sum)[TILES][4], int format, int left, const uint8_t* x, int lane,
                                              Ring& ring, Scales&& scales, Quickly&& quickly, Next&& next, int least) {
    const auto whole = [&] {  // four blocks, and as many more as can be
        do {
            ring.wait();
            const uint8_t *const codes = ring.byte(lane * 16), *const scale = ring.byte(lane * 2 + w4::CODE_BYTES);
#pragma unroll(TILES == 1 ? 4 : 2)
            for (int k = 0; k < 4; ++k)
                nvfp4_block(sum, codes + k * w4::BLOCK_BYTES, scale + k * w4::BLOCK_BYTES, x + k * 128);
            left -= 4, x += 4 * 128;
            asm volatile("" : "+r"(left));  // else it would be kept twice
            if (!quickly(ring)) return false;
        } while (left >= 4);
        return true;
    };
#pragma unroll 1
    do {
        if (left >= least) {
            if (whole()) continue;
        } else {
            ring.wait();
            const uint8_t* const codes = ring.byte(lane * 16);
            if (format == NVFP4) {
                const uint8_t* const scale = ring.byte(lane * 2 + w4::CODE_BYTES);
#pragma unroll 1
                for (int k = 0; k < left; ++k)
                    nvfp4_block(sum, codes + k * w4::BLOCK_BYTES, scale + k * w4::BLOCK_BYTES, x + k * 128);
                left -= 4, x += 4 * 128;
            } else if (EIGHT && format == FP8) {
                float scale[TILES];
                scales(scale, left);
#pragma unroll 1
                for (int k = 0; k < min(left, 2); ++k) fp8_block(sum, codes + k * 1024, x + k * 128, scale);
                left -= 2, x += 2 * 128;
            } else {
                plain_block(sum, codes, x);
                left -= 1, x += 128;
            }
        }
        next(ring);
    } while (left > 0);
}

// What undoes the scaling of codes, beside that of tokens.
__device__ __forceinline__ float undo_of(int format) { return format == NVFP4 ? w4::UNDO : 1.0f; }

// Up to eight tokens: sums of a slice, its scaling undone. undo: the slice's, from the lane's first token on.
template <int TILES>
__device__ __forceinline__ void undo_scaling(float (&sum)[TILES][4], float scale, const float* undo) {
    const float2 back = *reinterpret_cast<const float2*>(undo);
    const float even = back.x * scale, odd = back.y * scale;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        sum[i][0] *= even, sum[i][1] *= odd;
        sum[i][2] *= even, sum[i][3] *= odd;
    }
}

// A slice of a token, which the lanes of a warp hold, to shared memory: scaled for FP16 products, and what undoes that.
__device__ __forceinline__ void put_slice(uint32_t (&pairs)[8], bool plain, uint8_t* to, float* undo) {
    const int lane = threadIdx.x % 32;
    const float back = plain ? 1.0f : scale_to_f16(pairs);
    uint4* const at = reinterpret_cast<uint4*>(to + lane * 32);
    at[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    at[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
    if (lane == 0) *undo = back;
}

// Up to eight tokens: `count` slices of a part's columns from slice `first` on to shared memory, by WARPS warps:
// x [tokens][count] slices, rows `stride` bytes apart; undo [count][8]. per: 2^16 / count and one.
template <int WARPS>
__device__ __forceinline__ void stage_slices(const Part& part, int tokens, int columns, int first, int count, int per,
                                             uint8_t* x, int stride, float* undo) {
    constexpr int AT_ONCE = 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int token = warp * per >> 16, which = warp - token * count;
    const int step = WARPS * per >> 16, rest = WARPS - step * count;
    while (token < tokens) {
        uint32_t pairs[AT_ONCE][8];
        int tokens_of[AT_ONCE], slices_of[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            tokens_of[i] = token, slices_of[i] = which;
            const int column = (first + which) * SLICE + lane * 16;
            const bf16* from = part.x + min(token, tokens - 1) * part.x_stride + column;
            load_columns(pairs[i], from, columns - column, part.x_wide);
            token += step, which += rest;
            if (which >= count) which -= count, ++token;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (tokens_of[i] >= tokens) break;
            put_slice(pairs[i], part.format == PLAIN, x + tokens_of[i] * stride + slices_of[i] * 1024,
                      undo + slices_of[i] * 8 + tokens_of[i]);
        }
    }
}

}  // namespace dsv4::linear
