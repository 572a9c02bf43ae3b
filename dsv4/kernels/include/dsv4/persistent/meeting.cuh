// Blocks wait for each other. What a block has written before it comes is visible to all who have met it.
#pragma once
#include <dsv4/peers.cuh>
#include <dsv4/persistent/memory.cuh>

namespace dsv4::persistent {

// Counters may wrap around.
__device__ __forceinline__ void wait_until(const unsigned* counter, unsigned target) {
    while (static_cast<int>(exchange::arrived(counter) - target) < 0) {}
}

// In which turn of theirs a phase tells its rows to the ranks: asked for, a row by a thread, and put where all find it.
struct RowNumbers {
    const int token = threadIdx.x;
    const bool tells;
    uint32_t turn = 0;

    __device__ __forceinline__ RowNumbers(const mhc::Peers& peers, int tokens)
        : tells(peers.size > 0 && token < tokens) {
        if (tells) turn = peers.turn_of(token);
    }
    __device__ __forceinline__ void put() const {
        if (tells) position().numbers[token] = turn;
    }
};

constexpr int SPEAKER = THREADS - 32;  // the thread that comes and waits for its block: of a warp that is rarely busy then

// Where a block meets others. How often it has, its speaker alone knows.
struct Meetings {
    State* state;

    __device__ __forceinline__ explicit Meetings(State* state) : state(state) {
        if (threadIdx.x == SPEAKER) position().all = position().base = state->before;
    }
    // This block is here; all blocks are. Every thread calls. meets(): whether others are told; asked in front of the
    // barrier, by the speaker's warp alone, as that is not the one that is waited for.
    template <typename Meets>
    __device__ __forceinline__ void come(Meets&& meets) const {
        bool tells = false;
        if (threadIdx.x / 32 == SPEAKER / 32) tells = meets();
        __syncthreads();
        if (threadIdx.x != SPEAKER || !tells) return;
        exchange::arrive(&state->arrivals);
        position().all += gridDim.x;
    }
    __device__ __forceinline__ void come() const {
        come([] { return true; });
    }
    __device__ __forceinline__ void wait_for_all() const {
        see_all();
        __syncthreads();
    }
    // The same by the speaker alone.
    __device__ __forceinline__ void see_all() const {
        if (threadIdx.x == SPEAKER) wait_until(&state->arrivals, position().all);
    }

    // All have met for the last time: the next launch begins where this one ends.
    __device__ __forceinline__ void end() const {
        if (blockIdx.x == 0 && threadIdx.x == SPEAKER) state->before = position().all;
    }
};

}  // namespace dsv4::persistent
