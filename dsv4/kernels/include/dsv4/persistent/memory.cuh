// How a block's shared memory is laid out: two phases (the one at hand and the next), each warp's next segments, its
// barriers and its stream, the work area, of which every phase may use all and in which nothing outlives a phase, then the
// warps' rings.
#pragma once
#include <cstring>
#include <dsv4/persistent/program.cuh>

namespace dsv4::persistent {

// A warp's stream of weights (stream.cuh) between phases.
struct alignas(16) StreamState {
    const Segment* list;
    const uint8_t* from;
    int head, tail, held, parity, place, left, chunk, unused;
};

constexpr int HALF = 8;                    // segments of a list that are loaded at a time; two such halves are there
constexpr int BARRIERS = MAX_STAGES + 2;   // of a warp: of its stages and of the halves
constexpr int PHASES_AT = 0, SEGMENTS_AT = 2 * PHASE_BYTES, BARRIERS_AT = SEGMENTS_AT + WARPS * 2 * HALF * 16;
constexpr int PARKED_AT = BARRIERS_AT + WARPS * BARRIERS * 8;
constexpr int WORK_AT = (PARKED_AT + WARPS * static_cast<int>(sizeof(StreamState)) + 127) / 128 * 128;

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
