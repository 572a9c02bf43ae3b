// quantize: a block per row, 16 columns per thread and turn, kept in registers between the maximum and the codes, so a
// row is read once. The source is a row of x, or SwiGLU of a gate row and an up row (times a weight, rounded to BF16).
#include <dsv4/formats.cuh>
#include <dsv4/launch.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/swiglu.cuh>

using namespace dsv4;

namespace {

enum How : int { NONE = 0, FP8 = 1, NVFP4 = 2 };  // the codes of dsv4/kernels/quantize/kernel.py
constexpr unsigned ALL = 0xffffffffu;
constexpr int HALF = GROUP / 2;

struct Source {
    const void *x, *up;    // up: null without SwiGLU
    const float* weight;   // [rows] or null
    int64_t x_row, up_row; // elements between rows
    int x_column, up_column;
    float limit;
};

struct Result {
    bf16* values;      // [rows, K] or null
    uint8_t* codes;    // [rows, K/2] or null
    uint8_t* scales;   // [rows, K/16] or null
    float* globals;    // [rows] or null
};

template <typename T>
__device__ __forceinline__ void load_half(const T* row, int at, int k, int column, bool wide, float (&v)[HALF]) {
    if (column == 1) return load<HALF>(row + at, v, k - at, wide && at + HALF <= k);
#pragma unroll
    for (int i = 0; i < HALF; ++i) v[i] = at + i < k ? to_float(row[static_cast<int64_t>(at + i) * column]) : 0.0f;
}

template <typename T, bool SWIGLU>
__device__ __forceinline__ void load_group(const Source& from, int64_t row, int at, int k, bool wide, float weight,
                                           float (&v)[GROUP]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float x[HALF];
        load_half(static_cast<const T*>(from.x) + row * from.x_row, at + h * HALF, k, from.x_column, wide, x);
        if constexpr (SWIGLU) {
            float up[HALF];
            load_half(static_cast<const T*>(from.up) + row * from.up_row, at + h * HALF, k, from.up_column, wide, up);
#pragma unroll
            for (int i = 0; i < HALF; ++i) x[i] = rounded<bf16>(swiglu(x[i], up[i], from.limit) * weight);
        }
#pragma unroll
        for (int i = 0; i < HALF; ++i) v[h * HALF + i] = x[i];
    }
}

__device__ __forceinline__ uint32_t block_max(uint32_t x) {
    __shared__ uint32_t parts[32];
    x = __reduce_max_sync(ALL, x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    return __reduce_max_sync(ALL, lane < blockDim.x / 32 ? parts[lane] : 0u);
}

__device__ __forceinline__ void store_values(bf16* row, int at, int k, bool wide, const float (&v)[GROUP]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float half[HALF];
#pragma unroll
        for (int i = 0; i < HALF; ++i) half[i] = v[h * HALF + i];
        const int column = at + h * HALF;
        if (column < k) store<HALF>(row + column, half, k - column, wide && column + HALF <= k);
    }
}

template <typename T, bool SWIGLU, int HOW, int TURNS>
__global__ void quantize(Source from, Result to, int k, bool wide, bool wide_out) {
    const int64_t row = blockIdx.x;
    const float weight = SWIGLU && from.weight != nullptr ? from.weight[row] : 1.0f;
    float v[TURNS][GROUP];
    uint32_t amax = 0;
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        load_group<T, SWIGLU>(from, row, (turn * blockDim.x + threadIdx.x) * GROUP, k, wide, weight, v[turn]);
        if constexpr (HOW == NVFP4) amax = max(amax, group_amax(v[turn]));
    }
    float global = 1.0f;
    if constexpr (HOW == NVFP4) {
        global = nvfp4_global(block_max(amax));
        if (threadIdx.x == 0) to.globals[row] = global;
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int group = turn * blockDim.x + threadIdx.x, at = group * GROUP;
        if constexpr (HOW == FP8) {
            uint32_t largest = group_amax(v[turn]);
#pragma unroll
            for (int step = 4; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(ALL, largest, step));
            const float scale = fp8_scale(largest);
#pragma unroll
            for (int i = 0; i < GROUP; ++i) v[turn][i] = fp8_value(v[turn][i], scale);
        }
        if (at >= k) continue;
        if constexpr (HOW == NVFP4) {
            const Nvfp4Group packed = nvfp4_group(v[turn], global);
            if (to.codes != nullptr) {
                reinterpret_cast<uint2*>(to.codes)[row * (k / GROUP) + group] = packed.codes;
                to.scales[row * (k / GROUP) + group] = packed.scale;
                continue;
            }
            nvfp4_values(packed, v[turn]);
        }
        store_values(to.values + row * k, at, k, wide_out, v[turn]);
    }
}

constexpr int MOST_THREADS = 512;

template <typename T, bool SWIGLU, int HOW>
static cudaError_t run(const Source& from, const Result& to, int64_t rows, int k, bool wide, cudaStream_t stream) {
    const int groups = (k + GROUP - 1) / GROUP, threads = min((groups + 31) / 32 * 32, MOST_THREADS);
    const int turns = (groups + threads - 1) / threads;
    const bool wide_out = k % HALF == 0 && aligned16(to.values);
    auto go = [&](auto kernel) { return launch(kernel, rows, 1, threads, 0, 1, stream, from, to, k, wide, wide_out); };
    if (turns == 1) return go(quantize<T, SWIGLU, HOW, 1>);
    if (turns == 2) return go(quantize<T, SWIGLU, HOW, 2>);
    return go(quantize<T, SWIGLU, HOW, 4>);
}

template <typename T, bool SWIGLU>
static cudaError_t choose(int how, const Source& from, const Result& to, int64_t rows, int k, cudaStream_t stream) {
    const auto whole = [](const void* p, int64_t row, int column) {
        return aligned16(p) && row % HALF == 0 && column == 1;
    };
    const bool wide =
        whole(from.x, from.x_row, from.x_column) && (!SWIGLU || whole(from.up, from.up_row, from.up_column));
    if (how == NVFP4) return run<T, SWIGLU, NVFP4>(from, to, rows, k, wide, stream);
    if (how == FP8) return run<T, SWIGLU, FP8>(from, to, rows, k, wide, stream);
    return run<T, SWIGLU, NONE>(from, to, rows, k, wide, stream);
}

}  // namespace

extern "C" int dsv4_quantize(const void* x, const void* up, const float* weight, bf16* values, uint8_t* codes,
                             uint8_t* scales, float* globals, int64_t rows, int k, int64_t x_row, int x_column,
                             int64_t up_row, int up_column, float limit, int how, int dtype, cudaStream_t stream) {
    if (rows == 0 || k == 0) return cudaSuccess;
    const Source from = {x, up, weight, x_row, up_row, x_column, up_column, limit};
    const Result to = {values, codes, scales, globals};
    const auto plain = dtype == BF16 ? choose<bf16, false> : choose<float, false>;
    const auto gated = dtype == BF16 ? choose<bf16, true> : choose<float, true>;
    return (up == nullptr ? plain : gated)(how, from, to, rows, k, stream);
}
