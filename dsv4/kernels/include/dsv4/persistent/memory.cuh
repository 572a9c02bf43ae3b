// How a block's shared memory is laid out: two phases (the one at hand and the next), each warp's next segments, its
// barriers and its stream, where the block is in the program, what ROUTE leaves for EXPERTS, the work area, of which
// every phase may use all and in which nothing outlives a phase, then the warps' rings.
#pragma once
#include <cstring>
#include <dsv4/persistent/program.cuh>

namespace dsv4::persistent {

// A warp's stream of weights (stream.cuh) between phases.
struct alignas(16) StreamState {
    const uint8_t* from;
    int head, held, parity, place, left, chunk;
};
// The same, and what stays as it was at the beginning.
struct alignas(16) StreamPlace {
    StreamState state;
    const Segment* list;
    int stages;  // what is read here need not be asked for anew
};

// Where a block is. A register that lives through all phases would be kept in local memory, far away.
struct alignas(16) Position {
    unsigned all, base;        // arrivals that the last meeting waited for; those before this launch
    int turns[WARPS];          // by warp: the place of the phase at hand, 0 or 1
    uint32_t numbers[TOKENS];  // of the turn in which the phase at hand tells a row to the ranks
    uint32_t seams[TOKENS];    // of the turn of a row's sums in seams
};

constexpr int HALF = 8;                    // segments of a list that are loaded at a time; two such halves are there
constexpr int BARRIERS = MAX_STAGES + 2;   // of a warp: of its stages and of the halves
constexpr int PHASES_AT = 0, SEGMENTS_AT = 2 * PHASE_BYTES, BARRIERS_AT = SEGMENTS_AT + WARPS * 2 * HALF * 16;
constexpr int PARKED_AT = BARRIERS_AT + WARPS * BARRIERS * 8;
constexpr int POSITION_AT = PARKED_AT + WARPS * static_cast<int>(sizeof(StreamPlace));
constexpr int ROUTED_AT = POSITION_AT + static_cast<int>(sizeof(Position)), ROUTED_BYTES = 720;
constexpr int WORK_AT = (ROUTED_AT + ROUTED_BYTES + 127) / 128 * 128;

// Asked for anew where it is needed, so that the compiler knows accesses to be to shared memory.
__device__ __forceinline__ uint8_t* memory() {
    extern __shared__ __align__(128) uint8_t bytes[];
    return bytes;
}

// The work area as what a phase keeps there.
template <typename T>
__device__ __forceinline__ T& work() {
    return *reinterpret_cast<T*>(memory() + WORK_AT);
}

__device__ __forceinline__ Position& position() { return *reinterpret_cast<Position*>(memory() + POSITION_AT); }

// The number with which phase `phase` of this launch tells what it makes; no other launch tells it.
__device__ __forceinline__ uint32_t told_by(int phase) { return position().base + static_cast<uint32_t>(phase); }

// The phase in place `turn` (0 or 1).
__device__ __forceinline__ const Phase& phase_at(int turn) {
    return reinterpret_cast<const Phase*>(memory() + PHASES_AT)[turn];
}

// The warp's turn, read anew.
__device__ __forceinline__ int current_turn() {
    return *static_cast<volatile int*>(&position().turns[threadIdx.x / 32]);
}
// By every lane of the warp.
__device__ __forceinline__ void set_turn(int turn) {
    position().turns[threadIdx.x / 32] = turn;
    __syncwarp();
}

// The arguments of the phase in place `turn` (0 or 1).
template <typename T>
__device__ __forceinline__ const T& payload(int turn) {
    static_assert(sizeof(T) <= PAYLOAD_BYTES, "arguments fit into a phase");
    return *reinterpret_cast<const T*>(memory() + PHASES_AT + turn * PHASE_BYTES + 16);
}

// On the host: a phase and its arguments, every byte of it set.
template <typename T>
static cudaError_t fill_phase(Phase* phase, Kind kind, const T& arguments) {
    static_assert(sizeof(T) <= PAYLOAD_BYTES, "arguments fit into a phase");
    std::memset(phase, 0, sizeof(Phase));
    phase->kind = kind;
    std::memcpy(phase->payload, &arguments, sizeof(T));
    return cudaSuccess;
}

}  // namespace dsv4::persistent
