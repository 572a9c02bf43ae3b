// gather_columns: a block tells 1024 columns of a row to the other ranks, in words that carry the number of their turn
// (exchange.cuh), and hears theirs of the same place.
#include <dsv4/dependent.cuh>
#include <dsv4/exchange.cuh>

using namespace dsv4;

namespace {

constexpr int THREADS = 256, PAIRS = 2, COLUMNS = 2 * PAIRS * THREADS, MOST_ROWS = 8, MOST_RANKS = 8;

// inboxes [2][size][MOST_ROWS][width], width: columns up to a whole block's; turns [MOST_ROWS][width / COLUMNS]: the last of
// each block, which alone counts it. The two halves take turns as those of a seam do (peers.cuh).
struct Args {
    const float* x;
    float* out;
    uint64_t* inboxes[MOST_RANKS];
    uint32_t* turns;
    int columns, rank, size;
};

// The two columns of number `pair` of this thread, first those of this rank.
__device__ __forceinline__ int column_of(int pair) { return (blockIdx.x * PAIRS + pair) * 2 * THREADS + 2 * threadIdx.x; }

__device__ __forceinline__ void put(const Args& a, int from, int column, float first, float second) {
    float* to = a.out + (static_cast<int64_t>(blockIdx.y) * a.size + from) * a.columns + column;
    if (column < a.columns) to[0] = first;
    if (column + 1 < a.columns) to[1] = second;
}

// All blocks run at once: each hears what another rank's block of its place tells.
__global__ void __launch_bounds__(THREADS) gather_columns(const __grid_constant__ Args a) {
    uint32_t* number = a.turns + blockIdx.y * gridDim.x + blockIdx.x;
    let_next_start();
    ask_for(number);
    wait_for_previous();
    const uint32_t turn = exchange::last_turn(number) + 1;
    const auto place = [&](int owner, int from, int pair) {
        const int64_t row = (static_cast<int64_t>(turn & 1) * a.size + from) * MOST_ROWS + blockIdx.y;
        return a.inboxes[owner] + row * gridDim.x * COLUMNS + column_of(pair);
    };
    float own[PAIRS][2];
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        const int column = column_of(i);
        const float* from = a.x + static_cast<int64_t>(blockIdx.y) * a.columns + column;
        own[i][0] = column < a.columns ? from[0] : 0.0f;
        own[i][1] = column + 1 < a.columns ? from[1] : 0.0f;
    }
#pragma unroll 1
    for (int step = 1; step < a.size; ++step) {  // not all to one at a time
        const int to = a.rank + step < a.size ? a.rank + step : a.rank + step - a.size;
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) exchange::tell_peer(place(to, a.rank, i), own[i][0], own[i][1], turn);
    }
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) put(a, a.rank, column_of(i), own[i][0], own[i][1]);
#pragma unroll 1
    for (int step = 1; step < a.size; ++step) {
        const int from = a.rank + step < a.size ? a.rank + step : a.rank + step - a.size;
        exchange::Pair heard[PAIRS];
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) heard[i] = exchange::look_at_peer(place(a.rank, from, i));
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            while (!heard[i].of(turn)) heard[i] = exchange::look_at_peer(place(a.rank, from, i));
            put(a, from, column_of(i), heard[i].value(0), heard[i].value(1));
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) *number = turn;
}

}  // namespace

extern "C" int dsv4_gather_columns(const float* x, float* out, int rows, int columns, uint64_t* const* inboxes,
                                   uint32_t* turns, int rank, int size, cudaStream_t stream) {
    if (rows == 0 || columns == 0) return cudaSuccess;
    if (rows > MOST_ROWS || size < 1 || size > MOST_RANKS) return cudaErrorInvalidValue;
    Args args = {x, out, {}, turns, columns, rank, size};
    for (int i = 0; i < size; ++i) args.inboxes[i] = inboxes[i];
    const int blocks = (columns + COLUMNS - 1) / COLUMNS;
    int device = 0, processors = 0, together = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
    if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&together, gather_columns, THREADS, 0))
        return error;
    if (blocks * rows > processors * together) return cudaErrorCooperativeLaunchTooLarge;
    return launch_dependent(gather_columns, blocks, rows, THREADS, 0, stream, args);
}
