// Kernels that start before the one in front of them has ended (programmatic dependent launch). Every thread of such a
// kernel waits before it touches what an earlier kernel writes, so that the end of a kernel is the end of all before.
#pragma once
#include <dsv4/launch.cuh>

namespace dsv4 {

// All kernels in front have ended and what they wrote is visible.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may start once every block has said so, or has ended.
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

template <typename... Params, typename... Args>
static cudaError_t launch_dependent(void (*kernel)(Params...), int64_t blocks_x, int blocks_y, int threads,
                             size_t shared_bytes, cudaStream_t stream, Args... args) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    if (blocks_x > INT32_MAX) return cudaErrorInvalidConfiguration;
    config.gridDim = dim3(static_cast<unsigned>(blocks_x), blocks_y);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace dsv4
