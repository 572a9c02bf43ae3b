// advance: one block, a thread per row.
#include <dsv4/dependent.cuh>

namespace {

__global__ void advance(const int64_t* tokens, const int64_t* slots, int64_t* inputs, int64_t* positions,
                        int64_t* counters, int* counts, int64_t* ring, int64_t* step, int rows, int columns,
                        int64_t vocab, int64_t length) {
    dsv4::take_turn();
    const int64_t at = *step;
    __syncthreads();  // everyone has read the step
    if (threadIdx.x == 0) *step = at + 1;
    const int row = threadIdx.x;
    if (row >= rows || slots[row] < 0) return;
    const int64_t token = tokens[row];
    ring[at % length * columns + row] = token;
    positions[row] += 1;
    counters[row] += 1;
    if (token < 0 || token >= vocab) return;
    inputs[row] = token;
    if (counts != nullptr) counts[row * vocab + token] += 1;
}

}  // namespace

extern "C" int dsv4_advance(const int64_t* tokens, const int64_t* slots, int64_t* inputs, int64_t* positions,
                            int64_t* counters, int* counts, int64_t* ring, int64_t* step, int rows, int columns,
                            int64_t vocab, int64_t length, cudaStream_t stream) {
    return dsv4::launch_dependent(advance, 1, 1, (rows + 31) / 32 * 32 + (rows == 0 ? 32 : 0), 0, stream, tokens, slots,
                                  inputs, positions, counters, counts, ring, step, rows, columns, vocab, length);
}
