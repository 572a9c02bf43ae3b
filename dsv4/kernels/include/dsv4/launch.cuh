// What every launcher shares: dtype codes, one way to launch, and the text of an error.
// No torch header: a launcher takes raw pointers, sizes and a stream, and returns a cudaError_t as int.
#pragma once
#include <cstdint>

namespace dsv4 {

enum Dtype : int { BF16 = 0, F32 = 1 };  // the codes of dsv4/kernels/launch.py

// 16-byte accesses need every pointer and every row to start at a multiple of 16 bytes.
inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// dependent: the kernel may start before the one in front has ended (dependent.cuh says what it then owes).
// Static: were it weak, a pack would keep one copy for all ops, and their arguments may be other types of one name.
template <typename... Params, typename... Args>
static cudaError_t launch_as(bool dependent, void (*kernel)(Params...), int64_t blocks_x, int blocks_y, int threads,
                             size_t shared_bytes, int cluster, cudaStream_t stream, Args... args) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    if (blocks_x > INT32_MAX) return cudaErrorInvalidConfiguration;  // a dim3 would cut it off silently
    config.gridDim = dim3(static_cast<unsigned>(blocks_x), blocks_y);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
    if (dependent) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// A kernel that starts when all in front have ended.
template <typename... Params, typename... Args>
static cudaError_t launch(void (*kernel)(Params...), int64_t blocks_x, int blocks_y, int threads,
                          size_t shared_bytes, int cluster, cudaStream_t stream, Args... args) {
    return launch_as(false, kernel, blocks_x, blocks_y, threads, shared_bytes, cluster, stream, args...);
}

}  // namespace dsv4

// Each library carries the texts of its own runtime; `used` keeps it, `inline` lets one library hold many ops.
extern "C" inline __attribute__((used)) const char* dsv4_error(int code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}
