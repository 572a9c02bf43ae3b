// Thread block clusters: the rank of a block, the barrier of all its peers' threads, and reads of their shared memory.
#pragma once
#include <cstdint>

namespace dsv4 {

__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The barrier in two halves: work between them needs nothing of the peers.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ __forceinline__ void cluster_barrier() {
    cluster_arrive();
    cluster_wait();
}

__device__ __forceinline__ uint32_t peer_address(const void* mine, int rank) {
    const uint32_t local = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
    return remote;
}

// What block `rank` of the cluster holds at the same place of its shared memory.
__device__ __forceinline__ float peer_value(const float* mine, int rank) {
    float value;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(peer_address(mine, rank)) : "memory");
    return value;
}

__device__ __forceinline__ uint32_t peer_value(const uint32_t* mine, int rank) {
    uint32_t value;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(peer_address(mine, rank)) : "memory");
    return value;
}

__device__ __forceinline__ uint64_t peer_value(const uint64_t* mine, int rank) {
    uint64_t value;
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(peer_address(mine, rank)) : "memory");
    return value;
}

__device__ __forceinline__ void put_peer_value(uint64_t* mine, int rank, uint64_t value) {
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(peer_address(mine, rank)), "l"(value) : "memory");
}

}  // namespace dsv4
