// attn_inputs: a row and blockIdx.y of a block; the block that may complete an entry also keeps the token.
#include <dsv4/attn_inputs.cuh>
#include <dsv4/dependent.cuh>

using namespace dsv4;

namespace {

using dsv4::attn_inputs::Arguments;

__global__ void __launch_bounds__(compress::MAX_THREADS) attn_inputs_rows(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) float shared[];
    take_turn();
    const int part = a.parts[blockIdx.y];
    if (part <= dsv4::attn_inputs::KEYS) compress::keep_token(a.compressions[part], blockIdx.x);
    dsv4::attn_inputs::take<compress::W, false>(a, part, blockIdx.x, shared);
}

}  // namespace

extern "C" int dsv4_attn_inputs(ATTN_INPUTS_PARAMETERS, cudaStream_t stream) {
    if (q_rows == 0) return cudaSuccess;
    Arguments a;
    int threads;
    size_t shared;
    const cudaError_t error = dsv4::attn_inputs::arguments(a, threads, shared, ATTN_INPUTS_VALUES);
    if (error != cudaSuccess) return error;
    return launch_dependent(attn_inputs_rows, q_rows, a.count, threads, shared, stream, a);
}
