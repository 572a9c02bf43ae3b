// Blocks wait for each other. What a block has written before it comes is visible to all who have met it.
#pragma once
#include <dsv4/exchange.cuh>
#include <dsv4/persistent/program.cuh>

namespace dsv4::persistent {

// Counters may wrap around.
__device__ __forceinline__ void wait_until(const unsigned* counter, unsigned target) {
    while (static_cast<int>(exchange::arrived(counter) - target) < 0) {}
}

constexpr int SPEAKER = THREADS - 32;  // the thread that comes and waits for its block: of a warp that is rarely busy then

// How often a block has met others in this launch.
struct Meetings {
    State* state;
    unsigned target;  // arrivals at the last meeting of all
    unsigned group = 0;

    // This block is here; all blocks are. Every thread calls.
    __device__ __forceinline__ void come() {
        __syncthreads();
        if (threadIdx.x == SPEAKER) exchange::arrive(&state->arrivals);
        target += gridDim.x;
    }
    __device__ __forceinline__ void wait_for_all() {
        if (threadIdx.x == SPEAKER) wait_until(&state->arrivals, target);
        __syncthreads();
    }
    __device__ __forceinline__ void all() {
        come();
        wait_for_all();
    }

    // All blocks of this one's group of eight are here. Every thread calls, in every block of the group.
    __device__ __forceinline__ void of_group() {
        group += GROUP;
        __syncthreads();
        if (threadIdx.x == SPEAKER) {
            unsigned* counter = &state->groups[blockIdx.x / GROUP];
            exchange::arrive(counter);
            wait_until(counter, group);
        }
        __syncthreads();
    }
};

}  // namespace dsv4::persistent
