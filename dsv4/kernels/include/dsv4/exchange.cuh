// What blocks tell each other, one way, in one trip: values and the number of the turn in one access. Who reads the number
// of this turn has its values; words need not be cleared, since the number only grows. All blocks that exchange must be
// running at once, and launches that use the same words must follow one another.
//
// Blocks of one launch meet in the L2 cache, with three values to a word of 16 bytes. Ranks meet in each other's memory,
// over NVLink, with two values that bring the number each: 8 bytes arrive together there. Many values need half of that
// in plain words: a value's bits inverted, where 0 says that nothing is there yet. Who has read such a word puts 0 back.
#pragma once
#include <cstdint>

namespace dsv4::exchange {

constexpr int PER_WORD = 3;

// The i-th rank after this one: each begins with another, so that not all tell one at a time.
__device__ __forceinline__ int rank_after(int rank, int i, int size) {
    const int next = rank + i;
    return next < size ? next : next - size;
}

struct __align__(16) Word {
    float values[PER_WORD];
    uint32_t turn;
};

__device__ __forceinline__ void tell(Word* word, const float (&values)[PER_WORD], uint32_t turn) {
    const uint64_t low = static_cast<uint64_t>(__float_as_uint(values[1])) << 32 | __float_as_uint(values[0]);
    const uint64_t high = static_cast<uint64_t>(turn) << 32 | __float_as_uint(values[2]);
    asm volatile("{.reg .b128 w; mov.b128 w, {%1, %2}; st.relaxed.gpu.global.b128 [%0], w;}"
                 :
                 : "l"(word), "l"(low), "l"(high)
                 : "memory");
}

__device__ __forceinline__ Word look(const Word* word) {
    uint64_t low, high;
    asm volatile("{.reg .b128 w; ld.relaxed.gpu.global.b128 w, [%2]; mov.b128 {%0, %1}, w;}"
                 : "=l"(low), "=l"(high)
                 : "l"(word)
                 : "memory");
    return {{__uint_as_float(static_cast<uint32_t>(low)), __uint_as_float(static_cast<uint32_t>(low >> 32)),
             __uint_as_float(static_cast<uint32_t>(high))},
            static_cast<uint32_t>(high >> 32)};
}

// The number of the last turn. The L1 cache may hold an older one.
__device__ __forceinline__ uint32_t last_turn(const uint32_t* turns) {
    uint32_t turn;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(turn) : "l"(turns) : "memory");
    return turn;
}

// A value that one block tells another: where it is looked for, only these 8 bytes are asked for.
struct Value {
    float value;
    uint32_t turn;
};

__device__ __forceinline__ Value look_at_value(const uint64_t* from) {
    uint64_t word;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return {__uint_as_float(static_cast<uint32_t>(word)), static_cast<uint32_t>(word >> 32)};
}

struct Pair {
    uint64_t words[2];
    __device__ bool of(uint32_t turn) const {
        return static_cast<uint32_t>(words[0] >> 32) == turn && static_cast<uint32_t>(words[1] >> 32) == turn;
    }
    __device__ float value(int i) const { return __uint_as_float(static_cast<uint32_t>(words[i])); }
};

__device__ __forceinline__ void tell_peer(uint64_t* to, float a, float b, uint32_t turn) {
    const uint64_t number = static_cast<uint64_t>(turn) << 32;
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(number | __float_as_uint(a)),
                 "l"(number | __float_as_uint(b))
                 : "memory");
}

__device__ __forceinline__ void tell_peer(uint64_t* to, float a, uint32_t turn) {
    const uint64_t word = static_cast<uint64_t>(turn) << 32 | __float_as_uint(a);
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

__device__ __forceinline__ Pair look_at_peer(const uint64_t* from) {
    Pair pair;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(pair.words[0]), "=l"(pair.words[1])
                 : "l"(from)
                 : "memory");
    return pair;
}

// Four plain words. The NaN whose inverted bits are 0, which no operation makes, becomes another.
struct Four {
    uint32_t words[4];
    __device__ bool here() const { return words[0] != 0 && words[1] != 0 && words[2] != 0 && words[3] != 0; }
    __device__ float value(int i) const { return __uint_as_float(~words[i]); }
};

__device__ __forceinline__ void put_words(uint32_t* to, const uint32_t (&words)[4]) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3])
                 : "memory");
}

__device__ __forceinline__ void tell_four(uint32_t* to, const float (&values)[4]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = max(~__float_as_uint(values[i]), 1u);
    put_words(to, words);
}

__device__ __forceinline__ Four look_at_four(const uint32_t* from) {
    Four four;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(four.words[0]), "=r"(four.words[1]), "=r"(four.words[2]), "=r"(four.words[3])
                 : "l"(from)
                 : "memory");
    return four;
}

__device__ __forceinline__ void clear_four(uint32_t* at) { put_words(at, {0, 0, 0, 0}); }

// One block more has come, and what it has written is visible to those who see that; how many have.
__device__ __forceinline__ void arrive(unsigned* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ unsigned arrived(const unsigned* counter) {
    unsigned here;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(here) : "l"(counter) : "memory");
    return here;
}

}  // namespace dsv4::exchange
