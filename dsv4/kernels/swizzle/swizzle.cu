// swizzle: a block per 128 rows, a thread per 16 bytes of the result: four rows 32 apart, four columns each.
#include <cstdint>
#include <dsv4/dependent.cuh>

using namespace dsv4;

namespace {

constexpr int TILE_ROWS = 128, THREADS = 128;
constexpr unsigned ALL = 0xffffffffu;

// Rows begin .. end - 1 of the source are what tile `tile` of the grouped result holds; none beyond the last group.
__device__ void find_group(const int64_t* counts, int groups, int64_t rows, int64_t tile, int64_t& begin,
                           int64_t& end) {
    const int lane = threadIdx.x % 32;
    int64_t row = 0, at = 0;  // of the groups before
    begin = end = 0;
    for (int first = 0; first < groups; first += 32) {
        int64_t own = first + lane < groups ? counts[first + lane] : 0, own_tiles = (own + TILE_ROWS - 1) / TILE_ROWS;
        int64_t sum = own, tiles = own_tiles;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int64_t a = __shfl_up_sync(ALL, sum, step), b = __shfl_up_sync(ALL, tiles, step);
            if (lane >= step) sum += a, tiles += b;
        }
        const int64_t start = at + tiles - own_tiles;
        const unsigned holds = __ballot_sync(ALL, tile >= start && tile < start + own_tiles);
        if (holds != 0) {
            const int64_t from = row + sum - own + (tile - start) * TILE_ROWS, to = row + sum;
            const int lane_of = __ffs(holds) - 1;
            begin = __shfl_sync(ALL, from, lane_of), end = min(__shfl_sync(ALL, to, lane_of), rows);
            return;
        }
        row += __shfl_sync(ALL, sum, 31), at += __shfl_sync(ALL, tiles, 31);
    }
}

__global__ void __launch_bounds__(THREADS) swizzle(const uint8_t* scale, int64_t rows, int columns, int64_t row_stride,
                                                    int64_t matrix_stride, const int64_t* counts, int groups,
                                                    uint4* out, bool words) {
    take_turn();
    const int64_t tile = blockIdx.x;
    int64_t begin = tile * TILE_ROWS, end = rows;
    if (counts != nullptr) find_group(counts, groups, rows, tile, begin, end);
    const int across = (columns + 3) / 4;
    const uint8_t* from = scale + blockIdx.y * matrix_stride;
    uint4* to = out + (blockIdx.y * static_cast<int64_t>(gridDim.x) + tile) * across * 32;
    for (int unit = threadIdx.x; unit < across * 32; unit += THREADS) {
        const int column = unit / 32 * 4;
        uint32_t word[4];
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            const int64_t row = begin + unit % 32 + 32 * quarter;
            const uint8_t* at = from + row * row_stride + column;
            word[quarter] = 0;
            if (row >= end) continue;
            if (words && column + 4 <= columns) {
                word[quarter] = *reinterpret_cast<const uint32_t*>(at);
            } else {
                for (int i = 0; i < 4 && column + i < columns; ++i)
                    word[quarter] |= static_cast<uint32_t>(at[i]) << (8 * i);
            }
        }
        to[unit] = make_uint4(word[0], word[1], word[2], word[3]);
    }
}

}  // namespace

extern "C" int dsv4_swizzle(const uint8_t* scale, int64_t matrices, int64_t rows, int columns, int64_t row_stride,
                            int64_t matrix_stride, const int64_t* counts, int groups, uint4* out, int64_t tiles,
                            cudaStream_t stream) {
    if (matrices == 0 || tiles == 0 || columns == 0) return cudaSuccess;
    const bool words =
        reinterpret_cast<uintptr_t>(scale) % 4 == 0 && row_stride % 4 == 0 && matrix_stride % 4 == 0;
    if (matrices > 65535) return cudaErrorInvalidConfiguration;
    return launch_dependent(swizzle, tiles, static_cast<int>(matrices), THREADS, 0, stream, scale, rows, columns,
                            row_stride, matrix_stride, counts, groups, out, words);
}
