// INPUTS: what attn_inputs does. A part of a row to a block; tokens are kept beside the entries that they may complete.
#pragma once
#include <dsv4/attn_inputs.cuh>
#include <dsv4/persistent/memory.cuh>

namespace dsv4::persistent {

struct Inputs {
    attn_inputs::Arguments of;
    int rows;
};

// The last blocks have the first items. Work area: as compress::pool_entry has it.
static __device__ __forceinline__ void inputs_phase(int turn) {
    const Inputs& a = payload<Inputs>(turn);
    for (int item = gridDim.x - 1 - blockIdx.x; item < a.of.count * a.rows; item += gridDim.x) {
        const int part = item / a.rows;
        attn_inputs::take<2, true>(a.of, a.of.parts[part], item - part * a.rows, &work<float>());
        __syncthreads();  // the next one writes over what is shared
    }
}

static cudaError_t describe_inputs(Phase* phase, ATTN_INPUTS_PARAMETERS) {
    Inputs a = {};
    int threads;
    size_t shared;
    if (q_rows < 1 || q_rows > TOKENS) return cudaErrorInvalidValue;
    if (const cudaError_t error = attn_inputs::arguments(a.of, threads, shared, ATTN_INPUTS_VALUES)) return error;
    if (!attn_inputs::whole(a.of)) return cudaErrorInvalidValue;
    for (int i = 0; i < 2; ++i)
        if (a.of.compressions[i].width > 0) a.of.parts[a.of.count++] = i == 0 ? attn_inputs::STATE : attn_inputs::KEY_STATE;
    a.rows = static_cast<int>(q_rows);
    return fill_phase(phase, INPUTS, a);
}

}  // namespace dsv4::persistent
