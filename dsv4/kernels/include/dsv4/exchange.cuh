// What the blocks of one launch tell each other through the L2 cache, one way, in one trip: a value and the number of the
// turn, in one access of 8 bytes. Who reads the number of this turn has its value; words need not be cleared, since the
// number only grows. All blocks that exchange must be running at once, and launches that use the same words must follow
// one another.
#pragma once
#include <cstdint>

namespace dsv4::exchange {

__device__ __forceinline__ void tell(uint64_t* word, float value, uint32_t turn) {
    const uint64_t both = static_cast<uint64_t>(turn) << 32 | __float_as_uint(value);
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(both) : "memory");
}

__device__ __forceinline__ uint64_t look(const uint64_t* word) {
    uint64_t both;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(both) : "l"(word) : "memory");
    return both;
}

// The sum, in this order, of words[0], words[step], .. for `count` <= N of them; waits for each. All are asked for at
// once.
template <int N>
__device__ __forceinline__ float hear_sum(const uint64_t* words, int count, int step, uint32_t turn) {
    uint64_t both[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (i < count) both[i] = look(words + i * step);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (i < count) {
            while (static_cast<uint32_t>(both[i] >> 32) != turn) both[i] = look(words + i * step);
            sum += __uint_as_float(static_cast<uint32_t>(both[i]));
        }
    return sum;
}

// The number of the last turn. The L1 cache may hold an older one.
__device__ __forceinline__ uint32_t last_turn(const uint32_t* turns) {
    uint32_t turn;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(turn) : "l"(turns) : "memory");
    return turn;
}

}  // namespace dsv4::exchange
