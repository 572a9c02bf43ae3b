// router: a block per token.
#include <dsv4/router.cuh>

using namespace dsv4;

namespace {

using routing::Arguments;
using routing::THREADS;

template <int EACH>
__global__ void __launch_bounds__(THREADS) router(const __grid_constant__ Arguments a) {
    let_next_start();
    routing::route<EACH>(a, blockIdx.x);
}

}  // namespace

extern "C" int dsv4_router(const float* logits, const float* bias, const int64_t* tid2eid, const int64_t* tokens,
                           int64_t* ids, float* weights, int64_t rows, int experts, int64_t stride, int topk,
                           int64_t vocabulary, float route_scale, cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    if (experts > 1024) return cudaErrorInvalidValue;
    const Arguments args = {logits, bias, tid2eid, tokens, ids, weights, experts, topk, stride, vocabulary, route_scale};
    auto kernel = experts <= 256 ? router<8> : experts <= 384 ? router<12> : router<32>;
    return launch_dependent(kernel, rows, 1, tid2eid == nullptr ? THREADS : 32, 0, stream, args);
}
