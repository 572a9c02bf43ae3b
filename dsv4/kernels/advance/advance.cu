// advance: one block, a thread per row.
#include <dsv4/dependent.cuh>

namespace {

// Without waiting for what was there.
__device__ __forceinline__ void count_on(int64_t* number) { atomicAdd(reinterpret_cast<unsigned long long*>(number), 1ull); }

__global__ void advance(const int64_t* tokens, const int64_t* slots, int64_t* inputs, int64_t* positions,
                        int64_t* counters, int* counts, int64_t* ring, int64_t* step, int rows, int columns,
                        int64_t vocab, int64_t length) {
    const int row = threadIdx.x;
    dsv4::let_next_start();
    if (row < rows) {
        dsv4::ask_for(step), dsv4::ask_for(slots + row), dsv4::ask_for(inputs + row);
        dsv4::ask_for(positions + row), dsv4::ask_for(counters + row);
    }
    dsv4::wait_for_previous();
    const int64_t at = *step, token = row < rows ? tokens[row] : -1;
    const bool live = row < rows && slots[row] >= 0;
    __syncthreads();  // everyone has read the step
    if (threadIdx.x == 0) *step = at + 1;
    if (!live) return;
    ring[at % length * columns + row] = token;
    count_on(positions + row);
    count_on(counters + row);
    if (token < 0 || token >= vocab) return;
    inputs[row] = token;
    if (counts != nullptr) atomicAdd(counts + row * vocab + token, 1);
}

}  // namespace

extern "C" int dsv4_advance(const int64_t* tokens, const int64_t* slots, int64_t* inputs, int64_t* positions,
                            int64_t* counters, int* counts, int64_t* ring, int64_t* step, int rows, int columns,
                            int64_t vocab, int64_t length, cudaStream_t stream) {
    return dsv4::launch_dependent(advance, 1, 1, (rows + 31) / 32 * 32 + (rows == 0 ? 32 : 0), 0, stream, tokens, slots,
                                  inputs, positions, counters, counts, ring, step, rows, columns, vocab, length);
}
