// gather_columns: half of a block's threads tell this rank's columns to the other ranks, in plain words (exchange.cuh), and
// the others hear theirs.
#include <dsv4/dependent.cuh>
#include <dsv4/exchange.cuh>
#include <dsv4/numbers.cuh>

using namespace dsv4;

namespace {

constexpr int THREADS = 512, HALF = THREADS / 2, MOST_ROWS = 128, MOST_RANKS = 8, W = 4, AHEAD = 4;

// inboxes [2][size][MOST_ROWS][width], width: columns up to a multiple of W; turns [2]: the last turn, and how many blocks
// of this one have ended. The two halves of an inbox take turns. A rank writes turn n + 2 where turn n was once its launch
// of turn n + 1 has ended, in which it has heard every peer, whose launch of turn n had then ended: all its words are 0.
struct Args {
    const float* x;
    float* out;
    uint64_t* inboxes[MOST_RANKS];
    uint32_t* turns;
    int rows, columns, width, rank, size;
    bool wide;
};

// W columns of a row, by their number in the inbox.
struct Quad {
    int row, column;
    __device__ Quad(const Args& a, int number) {
        const int quads = a.width / W;
        row = number / quads, column = number % quads * W;
    }
    __device__ int left(const Args& a) const { return a.columns - column; }
    __device__ const float* in(const Args& a) const { return a.x + static_cast<int64_t>(row) * a.columns + column; }
    __device__ void put(const Args& a, int from, const float (&values)[W]) const {
        float* to = a.out + (static_cast<int64_t>(row) * a.size + from) * a.columns + column;
        store<W>(to, values, left(a), a.wide);
    }
};

// All blocks run at once: each hears what other ranks' blocks tell.
__global__ void __launch_bounds__(THREADS, 2) gather_columns(const __grid_constant__ Args a) {
    let_next_start();
    ask_for(a.turns);
    wait_for_previous();
    const uint32_t turn = exchange::last_turn(a.turns) + 1;
    const int quads = a.rows * (a.width / W), step = gridDim.x * HALF;
    const int begin = blockIdx.x * HALF + threadIdx.x % HALF;
    const auto words = [&](int owner, int from) {
        uint32_t* inbox = reinterpret_cast<uint32_t*>(a.inboxes[owner]);
        return inbox + (static_cast<int64_t>(turn & 1) * a.size + from) * MOST_ROWS * a.width;
    };
    if (threadIdx.x < HALF) {
#pragma unroll 1
        for (int first = begin; first < quads; first += AHEAD * step) {
            float own[AHEAD][W];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i)
                if (first + i * step < quads) {
                    const Quad quad(a, first + i * step);
                    load<W>(quad.in(a), own[i], quad.left(a), a.wide);
                }
#pragma unroll 1
            for (int away = 1; away < a.size; ++away) {
                const int to = exchange::rank_after(a.rank, away, a.size);
                uint32_t* at = words(to, a.rank) + static_cast<int64_t>(first) * W;
#pragma unroll
                for (int i = 0; i < AHEAD; ++i)
                    if (first + i * step < quads) exchange::tell_four(at + static_cast<int64_t>(i) * step * W, own[i]);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i)
                if (first + i * step < quads) Quad(a, first + i * step).put(a, a.rank, own[i]);
        }
    } else {
#pragma unroll 1
        for (int first = begin; first < quads; first += AHEAD * step)
#pragma unroll 1
            for (int away = 1; away < a.size; ++away) {
                const int from = a.rank >= away ? a.rank - away : a.rank - away + a.size;
                uint32_t* at = words(a.rank, from) + static_cast<int64_t>(first) * W;
                exchange::Four heard[AHEAD] = {};
#pragma unroll
                for (int i = 0; i < AHEAD; ++i)
                    if (first + i * step < quads) heard[i] = exchange::look_at_four(at + static_cast<int64_t>(i) * step * W);
#pragma unroll
                for (int i = 0; i < AHEAD; ++i)
                    if (first + i * step < quads) {
                        uint32_t* place = at + static_cast<int64_t>(i) * step * W;
                        while (!heard[i].here()) heard[i] = exchange::look_at_four(place);
                        exchange::clear_four(place);
                        const float values[W] = {heard[i].value(0), heard[i].value(1), heard[i].value(2), heard[i].value(3)};
                        Quad(a, first + i * step).put(a, from, values);
                    }
            }
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(a.turns + 1, 1u) == gridDim.x - 1) a.turns[0] = turn, a.turns[1] = 0;  // all blocks have read the last
}

}  // namespace

extern "C" int dsv4_gather_columns(const float* x, float* out, int rows, int columns, uint64_t* const* inboxes,
                                   uint32_t* turns, int rank, int size, cudaStream_t stream) {
    if (rows == 0 || columns == 0) return cudaSuccess;
    const int width = (columns + W - 1) / W * W;
    if (rows > MOST_ROWS || size < 1 || size > MOST_RANKS || width > INT32_MAX / MOST_ROWS) return cudaErrorInvalidValue;
    Args args = {x, out, {}, turns, rows, columns, width, rank, size, columns == width && aligned16(x) && aligned16(out)};
    for (int i = 0; i < size; ++i) args.inboxes[i] = inboxes[i];
    int device = 0, processors = 0, together = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
    if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&together, gather_columns, THREADS, 0))
        return error;
    const int wanted = (rows * (width / W) + HALF - 1) / HALF, most = processors * together;
    if (most == 0) return cudaErrorCooperativeLaunchTooLarge;
    return launch_dependent(gather_columns, wanted < most ? wanted : most, 1, THREADS, 0, stream, args);
}
