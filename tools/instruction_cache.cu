// What code costs that does not fit into an SM's instruction caches: loops of so many KB of independent FFMAs, by one warp,
// four and sixteen of a block, on six SMs and on 132.
//
//     nvcc -O3 -arch=sm_90a -o instruction_cache tools/instruction_cache.cu && ./instruction_cache
//
// Prints CSV: KB of the loop, threads, blocks, cycles an instruction of a warp.
#include <cstdio>
#include <cuda_runtime.h>

constexpr int LOOPS = 12, WARMUP = 2, BYTES = 16, SHARED = 150000;  // bytes of an instruction; one block to an SM

template <int COUNT>
__global__ void loop(float* out, long long* cycles, float z) {
    float a = threadIdx.x, b = z, c = z + 1, d = z + 2;
    long long begun = 0;
#pragma unroll 1
    for (int l = 0; l < LOOPS; ++l) {
        if (l == WARMUP) {
            __syncthreads();
            begun = clock64();
        }
#pragma unroll
        for (int i = 0; i < COUNT / 4; ++i) {
            asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(a) : "f"(z));
            asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(b) : "f"(z));
            asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(c) : "f"(z));
            asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(d) : "f"(z));
        }
    }
    __syncthreads();
    if (threadIdx.x == 0 && blockIdx.x == 5) *cycles = clock64() - begun;
    out[blockIdx.x * blockDim.x + threadIdx.x] = a + b + c + d;
}

template <int KB>
bool measure(float* out, long long* cycles) {
    constexpr int COUNT = KB * 1024 / BYTES;
    cudaFuncSetAttribute(loop<COUNT>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
    for (const int threads : {32, 128, 512})
        for (const int blocks : {6, 132}) {
            for (int i = 0; i < 2; ++i) loop<COUNT><<<blocks, threads, SHARED>>>(out, cycles, 7.0f);
            long long found = 0;
            if (const cudaError_t error = cudaMemcpy(&found, cycles, sizeof found, cudaMemcpyDefault)) {
                std::fprintf(stderr, "error: %s\n", cudaGetErrorString(error));
                return false;
            }
            std::printf("%d,%d,%d,%.2f\n", KB, threads, blocks, double(found) / (LOOPS - WARMUP) / COUNT);
        }
    return true;
}

template <int... KB>
bool all(float* out, long long* cycles) {
    return (measure<KB>(out, cycles) && ...);
}

int main() {
    float* out = nullptr;
    long long* cycles = nullptr;
    if (cudaMalloc(&out, 132 * 512 * sizeof(float)) || cudaMalloc(&cycles, sizeof *cycles)) {
        std::fprintf(stderr, "error: no GPU\n");
        return 1;
    }
    std::printf("kb,threads,blocks,cycles_per_instruction\n");
    return all<8, 16, 24, 32, 48, 64, 80, 96, 112, 120, 128, 136, 144, 160, 176, 192, 224, 256, 320, 384>(out, cycles) ? 0 : 1;
}
