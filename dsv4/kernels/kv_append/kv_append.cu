// kv_append: one warp per token makes the entry and writes it twice, to the result and to the token's place in the ring.
#include <dsv4/dependent.cuh>
#include <dsv4/kv_append.cuh>

using namespace dsv4;

namespace {

using kv_append::Arguments;

template <typename T, int ITER, bool PACKED>
__global__ void append_rows(const __grid_constant__ Arguments a) {
    take_turn();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (row < a.rows) kv_append::append<T, ITER, PACKED>(a, row);
}

template <typename T, bool PACKED>
cudaError_t run(const Arguments& a, cudaStream_t stream) {
    const int warps = a.rows < 512 ? 1 : 4;  // few rows: one to an SM
    auto kernel = a.n <= 256   ? append_rows<T, 1, PACKED>
                  : a.n <= 512 ? append_rows<T, 2, PACKED>
                               : append_rows<T, 4, PACKED>;
    return launch_dependent(kernel, (a.rows + warps - 1) / warps, 1, warps * 32, 0, stream, a);
}

}  // namespace

extern "C" int dsv4_kv_append(KV_APPEND_PARAMETERS, cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    const Arguments a = kv_append::arguments(KV_APPEND_VALUES);
    if (bytes > 0) return dtype == BF16 ? run<bf16, true>(a, stream) : cudaErrorInvalidValue;
    return dtype == BF16 ? run<bf16, false>(a, stream) : run<float, false>(a, stream);
}
