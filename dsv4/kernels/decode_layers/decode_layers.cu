// decode_layers: all layers of a decode step in one launch. Blocks, one per processor, walk through a program of phases and
// meet after each; a warp's weights come ahead of the work, across phases (persistent/stream.cuh).
#include <dsv4/dependent.cuh>
#include <dsv4/persistent/linear_phase.cuh>
#include <dsv4/persistent/meeting.cuh>

using namespace dsv4;
using namespace dsv4::persistent;

namespace {

// Brings phase `index` of the program to place `turn`; it is there for all after a wait for copies and a barrier.
__device__ __forceinline__ void fetch_phase(const Program& program, int index, int turn) {
    const int at = threadIdx.x * 16;
    if (at < PHASE_BYTES && index < program.count)
        start_copy16(shared_address(memory()) + PHASES_AT + turn * PHASE_BYTES + at,
                     reinterpret_cast<const uint8_t*>(program.phases + index) + at);
}

__device__ __forceinline__ int phase_kind(int turn) {
    return reinterpret_cast<const Phase*>(memory() + PHASES_AT)[turn].kind;
}

// end: 0 for the beginning of a phase, 1 for its end.
__device__ __forceinline__ void note_time(const Program& program, int index, int end) {
    if (program.times == nullptr || threadIdx.x > 0) return;
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    program.times[(static_cast<int64_t>(index) * gridDim.x + blockIdx.x) * 2 + end] = now;
}

__global__ void __launch_bounds__(THREADS, 1) decode_layers(const __grid_constant__ Program program) {
    Stream stream(program, threadIdx.x / 32);
    stream.fill();
    fetch_phase(program, 0, 0);
    wait_for_copies();
    __syncthreads();
    wait_for_previous();
    Meetings meetings = {program.state, program.state->before + gridDim.x};
#pragma unroll 1
    for (int index = 0; index <= program.count; ++index) {
        const int turn = index % 2;
        const int kind = index < program.count ? phase_kind(turn) : KINDS;
        Ahead ahead;
        const bool speaks = threadIdx.x / 32 == SPEAKER / 32;  // and prepares what it can when the wait is over
#pragma unroll 1
        for (int late = 0; late < 2; ++late) {
            if (kind == LINEAR && speaks == (late == 1)) prepare_linear(turn, stream, ahead);
            if (late == 0 && index > 0) meetings.wait_for_all();
        }
        if (kind == KINDS) break;
        fetch_phase(program, index + 1, turn ^ 1);
        note_time(program, index, 0);
        switch (kind) {
            case LINEAR: linear_phase(turn, stream, ahead); break;
            default: break;
        }
        note_time(program, index, 1);
        wait_for_copies();
        meetings.come();
    }
    if (blockIdx.x > 0) return;
    if (threadIdx.x == 0) program.state->before = meetings.target - gridDim.x;
    if (threadIdx.x < MAX_BLOCKS / GROUP) program.state->groups[threadIdx.x] = 0;
}

}  // namespace

extern "C" int dsv4_decode_layers_linear(Phase* phase, const linear::Part* parts, int count, const uint16_t* cuts, int grid,
                                         int tokens, int columns, cudaStream_t) {
    return describe_linear(phase, parts, count, cuts, grid, tokens, columns);
}

// times [count, grid, 2]: when each block began and ended each phase, in ns; or null.
extern "C" int dsv4_decode_layers(const Phase* phases, const Segment* segments, const uint32_t* starts, State* state,
                                  uint64_t* times, int count, int grid, int stages, int work_bytes, cudaStream_t stream) {
    if (count < 1 || grid < 1 || grid > MAX_BLOCKS || stages < 2 || stages > MAX_STAGES || work_bytes % 128)
        return cudaErrorInvalidValue;
    Program program = {};
    program.phases = phases, program.segments = segments, program.starts = starts, program.state = state;
    program.times = times, program.count = count, program.stages = stages, program.work_bytes = work_bytes;
    const int bytes = WORK_AT + work_bytes + WARPS * stages * CHUNK;
    const cudaError_t error = cudaFuncSetAttribute(decode_layers, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    return launch_dependent(decode_layers, grid, 1, THREADS, bytes, stream, program);
}
