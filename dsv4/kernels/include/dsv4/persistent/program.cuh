// A persistent kernel's program: a list of phases that all of its blocks work through together, one block per processor,
// and for each warp the weights that it will read, in the order in which it does.
#pragma once
#include <cstdint>

namespace dsv4::persistent {

constexpr int WARPS = 16, THREADS = WARPS * 32;
constexpr int TOKENS = 8;         // rows of a step, at most
constexpr int MAX_BLOCKS = 160;
constexpr int GROUP = 8;          // blocks 8 g .. 8 g + 7 are group g, if all eight exist
constexpr int PHASE_BYTES = 2048, PAYLOAD_BYTES = PHASE_BYTES - 16;
constexpr int MAX_STAGES = 8;     // of a warp's ring
constexpr int CHUNK = 2304;       // bytes of a stage: 4 NVFP4 blocks, 2 of FP8 or 1 of BF16

enum Kind : int { LINEAR, SEAM, EXPERTS, INPUTS, INDEX, ATTENTION, ROUTE, KINDS };

// One phase: what it does, and its arguments, whose type follows from that (the headers of the phases).
// NEXT: the next one needs nothing of this phase, LAST: this one nothing of the last; they do not meet. EIGHT_PHASE and
// RARE_PHASE: see EIGHT and RARE below.
enum Joined : int { NEXT = 1, LAST = 2, EIGHT_PHASE = 4, RARE_PHASE = 8 };

// Registers are scarce: what a block has to know of where it is in the program stands here.
struct alignas(16) Phase {
    int kind;
    int joined;
    int number, before;  // in the program; of what kinds (as bits) the phases in front are since blocks last met
    alignas(16) uint8_t payload[PAYLOAD_BYTES];
};
static_assert(sizeof(Phase) == PHASE_BYTES, "dsv4/kernels/decode_layers/describe.py lays programs out");

// Code that is not in an SM's caches takes three times as long, and a layer of all phases is more than those hold. So there
// are kernels that are small. EIGHT: there are FP8 weights. RARE: what few programs need is there: rows with more entries
// than a stage of attention, or than a group of blocks selects from, keys that are not packed, or of one row more heads than
// go in eights to groups. A phase that needs any of it says so.
//
// The kernel for ONE row knows that there is no more: what is done per row is then no loop.
template <bool ONE>
__device__ __forceinline__ constexpr int rows_of(int tokens) {
    return ONE ? 1 : tokens;
}

// Whether kind `kind` is among `kinds`.
__host__ __device__ constexpr bool among(int kinds, Kind kind) { return kinds >> kind & 1; }

// Weights that a warp reads one after the other, in pieces of `chunk` bytes. chunk 0: what comes here is not known before
// the step (routed experts), or it is the end.
struct alignas(16) Segment {
    const uint8_t* from;
    int bytes, chunk;
};

// Where blocks meet. Zeros before the first launch; launches of a program must follow one another.
struct State {
    unsigned arrivals;             // of all launches
    unsigned before;               // how many of them before this launch
    unsigned unused[2];
};

struct Program {
    const Phase* phases;
    const Segment* segments;  // ends with 16 that nobody uses
    const uint32_t* starts;   // [blocks, WARPS] where a warp's segments begin: multiples of 8
    State* state;
    const uint32_t* seams;  // [TOKENS] the last turn of each row's sums in seams
    uint64_t* times;  // [count, blocks, 2] when each block began and ended each phase, in ns; or null
    int count;        // of phases
    int stages, work_bytes;  // of shared memory: see memory.cuh
};

}  // namespace dsv4::persistent
