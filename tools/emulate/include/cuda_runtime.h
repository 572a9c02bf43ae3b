// Stands in front of CUDA's header: what kernels and launchers of this repository use of CUDA, on the machine of machine.h.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <tuple>

#include <intrinsics.h>
#include <launch.h>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorMisalignedAddress = 716,
    cudaErrorLaunchFailure = 719,
};
using cudaStream_t = void*;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        emulate::Index3 clusterDim;
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

template <typename Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}

template <typename... Params, typename... Args>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
    const std::tuple<Params...> given(args...);
    const dim3 &grid = config->gridDim, &threads = config->blockDim;
    const bool ended = emulate::launch({grid.x, grid.y, grid.z}, {threads.x, threads.y, threads.z},
                                       static_cast<unsigned>(config->dynamicSmemBytes),
                                       [kernel, given] { std::apply(kernel, given); });
    return ended ? cudaSuccess : cudaErrorLaunchFailure;
}

inline const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorLaunchFailure) return emulate::machine.message.c_str();
    return error == cudaSuccess ? "no error" : "invalid arguments of a launch";
}

// In what order the threads of the next launches run, and how many launches run side by side.
extern "C" inline __attribute__((used)) void emulate_as(uint64_t seed, int ranks) {
    emulate::seed = seed, emulate::ranks = ranks;
}

namespace emulate {

struct ThreadIndex {
    struct X { operator unsigned() const { return current->index.x; } } x;
    struct Y { operator unsigned() const { return current->index.y; } } y;
};
struct BlockIndex {
    struct X { operator unsigned() const { return current->warp->block->index.x; } } x;
    struct Y { operator unsigned() const { return current->warp->block->index.y; } } y;
};
struct GridSize {
    struct X { operator unsigned() const { return current->warp->block->grid->size.x; } } x;
    struct Y { operator unsigned() const { return current->warp->block->grid->size.y; } } y;
};
struct BlockSize {
    struct X { operator unsigned() const { return current->warp->block->grid->threads.x; } } x;
};

// Where a variable of a function lies in the shared memory of every block.
inline unsigned reserve(unsigned bytes) {
    static unsigned next = 0;
    const unsigned here = next;
    next += (bytes + 127) / 128 * 128;
    if (next > STATIC_BYTES) std::fprintf(stderr, "emulate: more than STATIC_BYTES of shared variables\n"), std::abort();
    return here;
}
template <typename T>
inline T& shared_variable(unsigned at) {
    return *reinterpret_cast<T*>(current->warp->block->shared + at);
}

}  // namespace emulate

static const emulate::ThreadIndex threadIdx{};
static const emulate::BlockIndex blockIdx{};
static const emulate::GridSize gridDim{};
static const emulate::BlockSize blockDim{};
