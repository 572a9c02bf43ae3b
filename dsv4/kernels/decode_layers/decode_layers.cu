// decode_layers: all layers of a decode step in one launch. Blocks, one per processor, walk through a program of phases and
// meet after each; a warp's weights come ahead of the work, across phases (persistent/stream.cuh).
#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>

// A thread's number and its block's are asked for anew in each place: else all that follows from them would be computed
// once, before the first phase, and be kept in local memory for want of registers. That goes through caches which the
// weights' rings leave small.
struct Number {
    unsigned x;
};
__device__ __forceinline__ Number this_thread() {
    unsigned x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return {x};
}
__device__ __forceinline__ Number this_block() {
    unsigned x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return {x};
}
#define threadIdx this_thread()
#define blockIdx this_block()

#include <dsv4/dependent.cuh>
#include <dsv4/persistent/attention_phase.cuh>
#include <dsv4/persistent/experts_phase.cuh>
#include <dsv4/persistent/index_phase.cuh>
#include <dsv4/persistent/inputs_phase.cuh>
#include <dsv4/persistent/linear_phase.cuh>
#include <dsv4/persistent/meeting.cuh>
#include <dsv4/persistent/route_phase.cuh>
#include <dsv4/persistent/seam_phase.cuh>

using namespace dsv4;
using namespace dsv4::persistent;

namespace {

// Brings phase `number` of the program to place `turn`; it is there for all after a wait for copies and a barrier.
__device__ __forceinline__ void fetch_phase(const Program& program, int number, int turn) {
    const int at = threadIdx.x * 16;
    if (at < PHASE_BYTES && number < program.count)
        start_copy16(shared_address(memory()) + PHASES_AT + turn * PHASE_BYTES + at,
                     reinterpret_cast<const uint8_t*>(program.phases + number) + at);
}

// end: 0 for the beginning of a phase, 1 for its end.
__device__ __forceinline__ void note_time(const Program& program, int turn, int end) {
    if (program.times == nullptr || threadIdx.x > 0) return;
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    program.times[(static_cast<int64_t>(phase_at(turn).number) * gridDim.x + blockIdx.x) * 2 + end] = now;
}

// The next phase is asked for, or the one behind it: nobody reads the one in front of the phase at hand any more.
__device__ __forceinline__ void ask(const Program& program, int turn, bool passes_over_next = false) {
    fetch_phase(program, phase_at(turn).number + (passes_over_next ? 2 : 1), turn ^ 1);
}

template <bool ONE, bool EIGHT, bool RARE>
__global__ void __launch_bounds__(THREADS, 1) decode_layers(const __grid_constant__ Program program) {
    {
        Stream stream(program, program.segments + program.starts[blockIdx.x * WARPS + Stream::warp()]);
        stream.fill();
        stream.park();
    }
    fetch_phase(program, 0, 0);
    wait_for_copies();
    __syncthreads();
    wait_for_previous();
    Meetings meetings(program.state);
    if (threadIdx.x < TOKENS) position().seams[threadIdx.x] = exchange::last_turn(program.seams + threadIdx.x);
    set_turn(0);
#pragma unroll 1
    while (true) {
        int turn = current_turn();
        const int kind = phase_at(turn).kind;
        const bool meets = !(phase_at(turn).joined & LAST);
        if (among(phase_at(turn).before, SEAM)) seam_rest<ONE>(turn ^ 1);
        if (kind == EXPERTS) {  // first, as everyone waits for it
            note_time(program, turn, 0);
            ask(program, turn);
            Stream stream(program);
            experts_phase<ONE>(turn, meetings, stream);
            stream.park();
        } else if (kind == LINEAR || kind == ROUTE) {
            Stream stream(program);
            Ahead ahead = {};
            const bool early = !among(phase_at(turn).before, SEAM);  // seam_rest reads the phase in front
            if (kind == ROUTE) route_ahead<ONE>(turn);
            find_work<ONE, EIGHT>(turn, ahead);
            linear_ahead<ONE>(turn);
            if (early) ask(program, turn);
            const bool speaks = threadIdx.x / 32 == SPEAKER / 32;  // looks out for others instead
            if (!speaks) prepare_linear<EIGHT>(turn, stream, ahead);
            if (meets && !(kind == ROUTE && routes())) meetings.wait_for_all();
            if (kind == LINEAR) look_at_tokens(ahead);
            note_time(program, turn, 0);
            if (!early) ask(program, turn);
            if (ahead.tiles() > 0) {
                if (kind == ROUTE) {
                    stream.park();  // for want of registers
                    activate<ONE>(turn);
                    stream = Stream(program);
                    look_at_tokens(ahead);
                }
                linear_products<ONE, EIGHT>(turn, stream, ahead);
            } else if (ahead.routes()) {
                if (routes()) pick<ONE>(turn);
                wait_for_copies();  // the phase behind is known then
            }
            if (ahead.works())
                linear_sums<ONE>(turn, ahead, [&] {
                    if (ahead.routes()) hear_plan<ONE>(turn, meetings);
                }, [&] {
                    if (ONE && ahead.routes()) begin_one(turn ^ 1, Stream(program));
                });
        } else {
            if (kind == SEAM) seam_ahead<ONE>(turn);
            if (kind == ATTENTION) attention_ahead<ONE, RARE>(turn, phase_at(turn).before);
            if (kind == INDEX) index_ahead<RARE>(turn, phase_at(turn).before);
            if (meets) meetings.wait_for_all();
            if (kind == INDEX) start_index<RARE>(turn);
            note_time(program, turn, 0);
            ask(program, turn, passes_over_next(turn));
            if (kind == SEAM) {
                seam_phase<ONE>(turn);
            } else if (kind == INPUTS) {
                inputs_phase(turn);
            } else if (kind == INDEX) {
                index_phase<RARE>(turn);
            } else {
                attention_phase<ONE, RARE>(turn, phase_at(turn).before);
            }
        }
        turn = current_turn();
        note_time(program, turn, 1);
        wait_for_copies();
        const bool last = phase_at(turn).number + 1 == program.count;
        meetings.come([] {
            const int behind = current_turn();
            return !(phase_at(behind).joined & NEXT) || passes_over_next(behind);
        });
        if (last) break;  // others may have begun, and the next phase but one comes to this one's place
        set_turn(turn ^ 1);
    }
    let_next_start();
    meetings.wait_for_all();
    meetings.end();
}

// What route_phase and experts_phase need at least.
int experts_work_bytes(int tokens, int experts, int topk, int D, int F, int grid) {
    return max(ExpertsLayout(tokens, topk, D, F, grid, 0).least, route_work_bytes(tokens, experts, topk, D, F, grid));
}

constexpr int INPUTS_BYTES = (3 * 512 + 8 * 3 * 512) * 4;  // as compress::pool_entry has it for 512 channels

}  // namespace

// What fills a phase: its arguments are those of the op that does the same, without a stream that anything waits for.
extern "C" int dsv4_decode_layers_linear(Phase* phase, const linear::Part* parts, int count, const uint16_t* cuts, int grid,
                                         int tokens, int columns, const float* norm, float eps, int joined,
                                         uint64_t* const* inboxes, uint32_t* turns, int rank, int size, cudaStream_t) {
    return describe_linear(phase, parts, count, cuts, grid, tokens, columns, norm, eps, joined, inboxes, turns, rank, size);
}

extern "C" int dsv4_decode_layers_seam(Phase* phase, const void* y, const void* h, const float* post, const float* comb,
                                       const float* fn, const float* base, const float* scale, const float* weight,
                                       void* h_out, void* x_out, float* post_out, float* comb_out, int64_t tokens, int D,
                                       int64_t y_stride, int iters, float hc_eps, float norm_eps,
                                       uint64_t* const* inboxes, uint32_t* turns, int rank, int size, void* words, int grid,
                                       cudaStream_t) {
    return describe_seam(phase, y, h, post, comb, fn, base, scale, weight, h_out, x_out, post_out, comb_out, tokens, D,
                         y_stride, iters, hc_eps, norm_eps, inboxes, turns, rank, size, words, grid);
}

extern "C" int dsv4_decode_layers_route(Phase* phase, const void* logits, const float* bias,
                                        const int64_t* tid2eid, const int64_t* token_ids, int64_t vocabulary,
                                        float route_scale, const void* x, int64_t x_row, const void* gate,
                                        int64_t gate_stride, const void* up, int64_t up_stride,
                                        const linear::Part* shared_w2, const uint16_t* cuts, void* plan, int tokens,
                                        int experts, int topk, int D, int F, float limit, int grid, int work_bytes,
                                        cudaStream_t) {
    return describe_route(phase, logits, bias, tid2eid, token_ids, vocabulary, route_scale, x, x_row, gate, gate_stride, up,
                          up_stride, shared_w2, cuts, plan, tokens, experts, topk, D, F, limit, grid, work_bytes);
}

extern "C" int dsv4_decode_layers_experts(Phase* phase, const void* shared, const void* plan, const void* x, int64_t x_row,
                                          const void* w13_tiles, const float* w13_alpha, const void* w2_tiles,
                                          const float* w2_alpha, void* mid, void* out, int out_f32, int tokens, int topk,
                                          int D, int F, float limit, uint64_t* const* inboxes, uint32_t* turns, int rank,
                                          int size, int grid, int work_bytes, cudaStream_t) {
    return describe_experts(phase, shared, plan, x, x_row, w13_tiles, w13_alpha, w2_tiles, w2_alpha, mid, out, out_f32,
                            tokens, topk, D, F, limit, inboxes, turns, rank, size, grid, work_bytes);
}

extern "C" int dsv4_decode_layers_inputs(Phase* phase, ATTN_INPUTS_PARAMETERS, cudaStream_t) {
    return describe_inputs(phase, ATTN_INPUTS_VALUES);
}

extern "C" int dsv4_decode_layers_index(Phase* phase, INDEX_PARAMETERS, void* scratch, int grid, int joined,
                                        cudaStream_t) {
    return describe_index(phase, INDEX_VALUES, scratch, grid, joined);
}

extern "C" int dsv4_decode_layers_attention(Phase* phase, const void* q, const void* local, const void* local_rows,
                                            const void* pool, const void* pool_rows, const void* sink, const void* cis,
                                            const void* turn, void* out, int64_t rows, int64_t turn_stride,
                                            int64_t local_stride, int64_t pool_stride, int64_t cis_stride, int heads,
                                            int local_width, int pool_width, int local_packed, int pool_packed, int rope,
                                            int split, float scale, float eps, void* scratch, void* chunks, int grid,
                                            cudaStream_t) {
    return describe_attention(phase, q, local, local_rows, pool, pool_rows, sink, cis, turn, out, rows, turn_stride,
                              local_stride, pool_stride, cis_stride, heads, local_width, pool_width, local_packed,
                              pool_packed, rope, split, scale, eps, scratch, chunks, grid);
}

static_assert(offsetof(SeamWork, heard) <= MADE_LEAST, "seam_rest and find_work go on at once");
static_assert(2 * sizeof(uint64_t) * moe::FEW_PAIRS <= 1024, "PLAN_BYTES in dsv4/kernels/decode_layers/describe.py");

// sizes: bytes of the seams' words, of the indexer's and attention's scratch, of the state; of the work area that phases
// other than LINEAR need; of shared memory in front of it.
extern "C" int dsv4_decode_layers_sizes(int* sizes, int grid, int rows, int D, int F, int experts, int topk, cudaStream_t) {
    int work = ATTENTION_BYTES;
    for (const int other : {seam_work_bytes(D, grid), static_cast<int>(sizeof(IndexWork)),
                            static_cast<int>(sizeof(ranges::Work)), INPUTS_BYTES,
                            experts_work_bytes(rows, experts, topk, D, F, grid)})
        work = work < other ? other : work;
    const int found[] = {static_cast<int>(sizeof(mhc::Words<mhc::SEAM>)), index_scratch(grid, rows),
                         static_cast<int>(attention_scratch(grid)), static_cast<int>(sizeof(State)), work, WORK_AT};
    for (int i = 0; i < 6; ++i) sizes[i] = found[i];
    return cudaSuccess;
}

// The smallest kernel that has what phases need: bits of Joined.
template <bool ONE>
static auto kernel_for(int needs) {
    if (needs & RARE_PHASE) return decode_layers<ONE, true, true>;
    return needs & EIGHT_PHASE ? decode_layers<ONE, true, false> : decode_layers<ONE, false, false>;
}

// words: of the seams. needs: what any phase says that it needs. times [count, grid, 2]: when each block began and ended
// each phase, in ns; or null.
extern "C" int dsv4_decode_layers(const Phase* phases, const Segment* segments, const uint32_t* starts, State* state,
                                  const void* words, uint64_t* times, int count, int rows, int needs, int grid, int stages,
                                  int work_bytes, cudaStream_t stream) {
    if (count < 1 || grid < 1 || grid > MAX_BLOCKS || stages < 2 || stages > MAX_STAGES || work_bytes % 128)
        return cudaErrorInvalidValue;
    Program program = {};
    program.phases = phases, program.segments = segments, program.starts = starts, program.state = state;
    program.seams = static_cast<const mhc::Words<mhc::SEAM>*>(words)->turns;
    program.times = times, program.count = count, program.stages = stages, program.work_bytes = work_bytes;
    const int bytes = WORK_AT + work_bytes + WARPS * stages * CHUNK;
    const auto kernel = rows == 1 ? kernel_for<true>(needs) : kernel_for<false>(needs);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    return launch_dependent(kernel, grid, 1, THREADS, bytes, stream, program);
}
