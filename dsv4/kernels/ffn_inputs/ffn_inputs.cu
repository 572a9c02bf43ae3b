// ffn_inputs: blockIdx.x is the row; the first block along y routes it, the others activate 2048 columns each.
#include <dsv4/numbers.cuh>
#include <dsv4/router.cuh>
#include <dsv4/swiglu.cuh>

using namespace dsv4;

namespace {

constexpr int THREADS = routing::THREADS, W = wide_elements<bf16>;

struct Arguments {
    routing::Arguments route;
    const bf16 *gate, *up;
    bf16* out;
    int width;
    int64_t gate_stride, up_stride;
    float limit;
    bool wide;
};

template <int EACH>
__global__ void __launch_bounds__(THREADS) ffn_inputs(const __grid_constant__ Arguments a) {
    let_next_start();
    const int64_t row = blockIdx.x;
    if (blockIdx.y == 0) {
        routing::route<EACH>(a.route, row);
        return;
    }
    wait_for_previous();
    const int i = ((blockIdx.y - 1) * THREADS + threadIdx.x) * W, left = a.width - i;
    if (left <= 0) return;
    float g[W], u[W];
    load<W>(a.gate + row * a.gate_stride + i, g, left, a.wide);
    load<W>(a.up + row * a.up_stride + i, u, left, a.wide);
#pragma unroll
    for (int k = 0; k < W; ++k) u[k] = swiglu(g[k], u[k], a.limit);
    store<W>(a.out + row * a.width + i, u, left, a.wide);
}

}  // namespace

extern "C" int dsv4_ffn_inputs(const float* logits, const float* bias, const int64_t* tid2eid, const int64_t* tokens,
                               int64_t* ids, float* weights, int64_t rows, int experts, int64_t stride, int topk,
                               int64_t vocabulary, float route_scale, const void* gate, const void* up, void* out,
                               int width, int64_t gate_stride, int64_t up_stride, float limit, cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    if (experts > 1024) return cudaErrorInvalidValue;
    Arguments a = {};
    a.route = {logits, bias, tid2eid, tokens, ids, weights, experts, topk, stride, vocabulary, route_scale};
    a.gate = static_cast<const bf16*>(gate), a.up = static_cast<const bf16*>(up), a.out = static_cast<bf16*>(out);
    a.width = width, a.gate_stride = gate_stride, a.up_stride = up_stride, a.limit = limit;
    a.wide = width % W == 0 && gate_stride % W == 0 && up_stride % W == 0 && aligned16(gate) && aligned16(up) &&
             aligned16(out);
    auto kernel = experts <= 256 ? ffn_inputs<8> : experts <= 384 ? ffn_inputs<12> : ffn_inputs<32>;
    return launch_dependent(kernel, rows, 1 + (width + THREADS * W - 1) / (THREADS * W), THREADS, 0, stream, a);
}
