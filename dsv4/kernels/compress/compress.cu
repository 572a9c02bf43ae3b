// compress: one block per entry pools its tokens, its first warp makes and stores the entry. A decode step is one launch:
// block i also writes token i into the state, and the newest token of an entry is taken from the inputs, so that no block
// reads what another writes. A chunk is two: the entries, which read the old state, then what stays in it.
#include <dsv4/compress.cuh>
#include <dsv4/dependent.cuh>

using namespace dsv4;

namespace {

using compress::Arguments;

template <typename T, int ITER, bool INDEX, bool PACKED>
__global__ void __launch_bounds__(compress::MAX_THREADS)
    pool_entries(const __grid_constant__ Arguments a, int groups) {
    extern __shared__ __align__(16) float shared[];
    take_turn();
    compress::keep_token(a, blockIdx.x);
    const int64_t to = compress::pool_entry<compress::W, T>(a, blockIdx.x, groups, shared);
    if (to >= 0 && threadIdx.x < 32) compress::finish<T, ITER, INDEX, PACKED>(a, shared, to);
}

__global__ void __launch_bounds__(256) keep(const __grid_constant__ Arguments a) {
    take_turn();
    const int64_t to = a.write_to[blockIdx.x];
    if (to >= 0) compress::write_state(a, a.write_rows[blockIdx.x], to);
}

template <typename T, int ITER, bool INDEX, bool PACKED>
cudaError_t run(const Arguments& a, cudaStream_t stream) {
    const int64_t blocks = a.from_state ? max(a.tokens, a.entries) : a.entries;
    cudaError_t error = cudaSuccess;
    if (blocks > 0)
        error = launch_dependent(pool_entries<T, ITER, INDEX, PACKED>, blocks, 1, compress::threads_of(a),
                                 compress::shared_of(a), stream, a, compress::groups_of(a));
    if (error == cudaSuccess && !a.from_state && a.written > 0)
        error = launch_dependent(keep, a.written, 1, 256, 0, stream, a);
    return error;
}

template <typename T, bool INDEX, bool PACKED>
cudaError_t sized(const Arguments& a, cudaStream_t stream) {
    if constexpr (INDEX) {
        return run<T, 1, true, PACKED>(a, stream);
    } else {
        if (a.width <= 256) return run<T, 1, false, PACKED>(a, stream);
        return a.width <= 512 ? run<T, 2, false, PACKED>(a, stream) : run<T, 4, false, PACKED>(a, stream);
    }
}

}  // namespace

extern "C" int dsv4_compress(COMPRESS_PARAMETERS(), cudaStream_t stream) {
    const Arguments a = compress::arguments(COMPRESS_VALUES());
    if (bytes > 0 && dtype != BF16) return cudaErrorInvalidValue;
    if (bytes > 0) return index ? sized<bf16, true, true>(a, stream) : sized<bf16, false, true>(a, stream);
    if (dtype == BF16) return index ? sized<bf16, true, false>(a, stream) : sized<bf16, false, false>(a, stream);
    return index ? sized<float, true, false>(a, stream) : sized<float, false, false>(a, stream);
}
