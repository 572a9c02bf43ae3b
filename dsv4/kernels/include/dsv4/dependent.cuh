// Kernels that start before the one in front of them has ended (programmatic dependent launch). What such a kernel owes:
//   - Every thread waits before it reads what an earlier kernel may write and before it writes anything; no block ends
//     without having waited. The end of a kernel is then the end of all before it.
//   - Before the wait it may read what was written when the model was loaded: weights; and what the kernel in front had
//     waited for before it let this one start. Anything else it may only ask for.
// The next kernel may start once every block has said so. It waits in turn, so saying so costs nothing but the room that
// its blocks take; they start when all of this kernel's are running, and cannot keep them from it. A kernel whose blocks
// fill processors says so when its own turn has come: else those of the next but one lie where the next one's belong.
#pragma once
#include <dsv4/launch.cuh>

namespace dsv4 {

// All kernels in front have ended and what they wrote is visible.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may start once every block has said so, or has ended.
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Brings to the L2 cache what will be read: what a step reads once lies in memory by then, weights having come between. It
// reads nothing, so it may be asked for before the wait. Not for addresses that are not there.
__device__ __forceinline__ void ask_for(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

// A kernel's arguments are far away when they are first asked for. What is made of them, said here in front of its turn, is
// at hand when that comes.
__device__ __forceinline__ void at_hand(const void* value) { asm volatile("" ::"l"(value)); }
__device__ __forceinline__ void at_hand(int64_t value) { asm volatile("" ::"l"(value)); }
__device__ __forceinline__ void at_hand(int value) { asm volatile("" ::"r"(value)); }
__device__ __forceinline__ void at_hand(float value) { asm volatile("" ::"f"(value)); }
template <typename... Values>
__device__ __forceinline__ void all_at_hand(Values... values) {
    (at_hand(values), ...);
}

// What a kernel begins with that has nothing to do before its turn.
__device__ __forceinline__ void take_turn() {
    let_next_start();
    wait_for_previous();
}

template <typename... Params, typename... Args>
static cudaError_t launch_dependent(void (*kernel)(Params...), int64_t blocks_x, int blocks_y, int threads,
                             size_t shared_bytes, cudaStream_t stream, Args... args) {
    return launch_as(true, kernel, blocks_x, blocks_y, threads, shared_bytes, 1, stream, args...);
}

// The same in clusters of so many blocks along x.
template <typename... Params, typename... Args>
static cudaError_t launch_dependent_clusters(void (*kernel)(Params...), int64_t blocks_x, int threads,
                                             size_t shared_bytes, int cluster, cudaStream_t stream, Args... args) {
    return launch_as(true, kernel, blocks_x, 1, threads, shared_bytes, cluster, stream, args...);
}

}  // namespace dsv4
