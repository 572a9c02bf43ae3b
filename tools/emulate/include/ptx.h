// What inline PTX does, by the names that ../ptx.py gives it: outputs by reference, then inputs, in the order of the operands.
#pragma once
#include <matrices.h>

namespace emulate::ptx {

struct Address {
    uint8_t* p;
    Address(const void* pointer) : p(static_cast<uint8_t*>(const_cast<void*>(pointer))) {}
    Address(uint64_t number) : p(reinterpret_cast<uint8_t*>(number)) {}
    template <typename T>
    T read() const {
        T value;
        if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) fail(text("%zu bytes at %p", sizeof(T), p));
        std::memcpy(&value, p, sizeof value);
        return value;
    }
    template <typename T>
    void write(T value) const {
        if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) fail(text("%zu bytes at %p", sizeof(T), p));
        std::memcpy(p, &value, sizeof value);
        machine.quiet = 0;
    }
};
struct Two64 {
    uint64_t words[2];
};
struct Four32 {
    uint32_t words[4];
};

template <typename... Any>
inline void nothing(const Any&...) {}
inline void cache_policy(uint64_t& policy) { policy = 0; }

// Where a thread is.
inline void thread_index(unsigned& x) { x = current->index.x; }
inline void block_index(unsigned& x) { x = current->warp->block->index.x; }
inline void lane_index(unsigned& x) { x = static_cast<unsigned>(current->lane); }
template <typename T>
inline void lane_index(T& x) {
    x = static_cast<T>(current->lane);
}
inline void timer(uint64_t& now) { now = machine.turns; }
inline void elect(uint32_t& yes, EMULATE_AT) {
    together(0xffffffffu, "elect", EMULATE_HERE, [](Thread*, unsigned) {});
    yes = current->lane == 0;
}

// Memory that others look at.
template <typename T>
inline void load(T& value, Address from, EMULATE_AT) {
    value = from.read<T>();
    looked("a word of memory", EMULATE_HERE);
}
inline void load_two(uint64_t& a, uint64_t& b, Address from, EMULATE_AT) {
    const Two64 found = from.read<Two64>();
    a = found.words[0], b = found.words[1];
    looked("a word of memory", EMULATE_HERE);
}
inline void load_four(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, Address from, EMULATE_AT) {
    const Four32 found = from.read<Four32>();
    a = found.words[0], b = found.words[1], c = found.words[2], d = found.words[3];
    looked("a word of memory", EMULATE_HERE);
}
template <typename T>
inline void store32(Address to, T value) {
    static_assert(sizeof(T) == 4);
    to.write(value);
}
inline void store64(Address to, uint64_t value) { to.write(value); }
inline void store_two(Address to, uint64_t a, uint64_t b) { to.write(Two64{a, b}); }
inline void store_four(Address to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) { to.write(Four32{a, b, c, d}); }
inline void add_one(Address to) { to.write(to.read<uint32_t>() + 1); }

// Barriers, and copies that land late.
inline void named_barrier_1(unsigned threads, EMULATE_AT) { meet(1, threads, true, EMULATE_HERE); }
inline void named_barrier(unsigned number, unsigned threads, EMULATE_AT) { meet(number, threads, true, EMULATE_HERE); }
inline void barrier_init(uint32_t address, unsigned arrivals) {
    *reinterpret_cast<CopyBarrier*>(shared_at(*current->warp->block, address, 8)) = {
        KNOWN, 0, static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0};
}
inline void arrive_expecting(uint32_t address, uint32_t bytes) {
    Block& block = *current->warp->block;
    CopyBarrier& barrier = barrier_at(block, address);
    if (barrier.pending == 0) fail(text("one arrival too many at the barrier at %u", address));
    --barrier.pending, barrier.bytes += static_cast<int32_t>(bytes);
    end_phase(block, address);
}
inline void wait_parity(uint32_t address, uint32_t parity, EMULATE_AT) {
    Thread& me = *current;
    if (barrier_at(*me.warp->block, address).phase != parity) return;
    me.number = address, me.parity = parity;
    sleep(Wait::COPY, "copies of barrier", EMULATE_HERE);
}
inline void copy_bulk(uint32_t target, Address source, uint32_t bytes, uint32_t barrier) {
    Block& block = *current->warp->block;
    if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(source.p) % 16 != 0)
        fail(text("a bulk copy of %u bytes from %p", bytes, source.p));
    barrier_at(block, barrier);
    shared_at(block, target + bytes - 16, 16);
    block.copies.push_back({shared_at(block, target, 16), source.p, bytes, 0, barrier});
    ++machine.copying;
}
inline void copy_bulk(uint32_t target, Address source, uint32_t bytes, uint32_t barrier, uint64_t) {
    copy_bulk(target, source, bytes, barrier);
}
inline void copy4(uint32_t target, Address source) { start_copy(target, source.p, 4); }
inline void copy8(uint32_t target, Address source) { start_copy(target, source.p, 8); }
inline void copy16(uint32_t target, Address source) { start_copy(target, source.p, 16); }
inline void commit_group() { ++current->group; }
inline void wait_group(unsigned but) { wait_for_groups(but); }
inline void wait_all_groups() { wait_for_groups(0); }
inline void wait_all() { wait_for_all_copies(); }

// Matrices.
inline void mma_f16(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                    uint32_t b0, uint32_t b1, EMULATE_AT) {
    product({&c0, &c1, &c2, &c3}, {a0, a1, a2, a3, b0, b1}, "mma of f16", EMULATE_HERE, from_f16);
}
inline void mma_bf16(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                     uint32_t b0, uint32_t b1, EMULATE_AT) {
    product({&c0, &c1, &c2, &c3}, {a0, a1, a2, a3, b0, b1}, "mma of bf16", EMULATE_HERE, from_bf16);
}
inline void ldmatrix(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t row, EMULATE_AT) {
    emulate::load_four({&a, &b, &c, &d}, row, false, "ldmatrix", EMULATE_HERE);
}
inline void ldmatrix_transposed(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t row, EMULATE_AT) {
    emulate::load_four({&a, &b, &c, &d}, row, true, "ldmatrix.trans", EMULATE_HERE);
}
inline void movmatrix(uint32_t& to, uint32_t from, EMULATE_AT) { to = transposed(from, EMULATE_HERE); }

// Numbers.
inline void f16x2_of(uint32_t& both, float high, float low) { both = pair(to_f16(low), to_f16(high)); }
inline void bf16x2_of(uint32_t& both, float high, float low) { both = pair(to_bf16(low), to_bf16(high)); }
inline void bf16_of(uint16_t& bits, float x) { bits = to_bf16(x); }
inline void relu_bf16x2_of(uint32_t& both, float high, float low) {
    const auto positive = [](float x) { return x <= 0.0f ? 0.0f : x; };  // NaN stays
    both = pair(to_bf16(positive(low)), to_bf16(positive(high)));
}
inline void floats_of_f16x2(float& low, float& high, uint32_t both) {
    low = from_f16(static_cast<uint16_t>(both)), high = from_f16(static_cast<uint16_t>(both >> 16));
}
inline void e4m3x2_of(uint16_t& both, float high, float low) {
    both = static_cast<uint16_t>(to_e4m3(high) << 8 | to_e4m3(low));
}
inline void float_of_e4m3(float& x, uint16_t both) { x = from_e4m3(static_cast<uint8_t>(both)); }
inline void f16x2_of_e4m3x2(uint32_t& both, uint16_t bytes) {
    both = pair(to_f16(from_e4m3(static_cast<uint8_t>(bytes))), to_f16(from_e4m3(static_cast<uint8_t>(bytes >> 8))));
}
template <typename Do>
inline uint32_t of_f16(Do with, uint32_t x, uint32_t y) {
    const auto one = [&](int shift) {
        return to_f16(with(from_f16(static_cast<uint16_t>(x >> shift)), from_f16(static_cast<uint16_t>(y >> shift))));
    };
    return pair(one(0), one(16));
}
template <typename Do>
inline uint32_t of_bf16(Do with, uint32_t x, uint32_t y, uint32_t z) {
    const auto one = [&](int shift) {
        return to_bf16(with(from_bf16(static_cast<uint16_t>(x >> shift)), from_bf16(static_cast<uint16_t>(y >> shift)),
                            from_bf16(static_cast<uint16_t>(z >> shift))));
    };
    return pair(one(0), one(16));
}
inline void mul_f16x2(uint32_t& z, uint32_t x, uint32_t y) {
    z = of_f16([](float a, float b) { return a * b; }, x, y);
}
inline void mul_bf16x2(uint32_t& z, uint32_t x, uint32_t y) {
    z = of_bf16([](float a, float b, float) { return a * b; }, x, y, 0);
}
inline void max_bf16x2(uint32_t& z, uint32_t x, uint32_t y) {
    z = of_bf16([](float a, float b, float) { return a != a ? b : b != b ? a : a > b ? a : b; }, x, y, 0);
}
// Rounded to float32 in between: a tie of BF16 may then be missed.
inline void fma_bf16x2(uint32_t& sum, uint32_t x, uint32_t y, uint32_t z) {
    sum = of_bf16([](float a, float b, float c) { return std::fmaf(a, b, c); }, x, y, z);
}
inline void reciprocal(float& one, float x) {
    const auto flushed = [](float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; };
    one = flushed(1.0f / flushed(x));
}

// Bits.
inline uint32_t permuted(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t found = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t which = selector >> 4 * i & 15;
        uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (which & 7)) & 0xFF;
        if (which & 8) byte = byte & 0x80 ? 0xFF : 0;
        found |= byte << 8 * i;
    }
    return found;
}
inline void permute_with_zero(uint32_t& y, uint32_t x, uint32_t selector) { y = permuted(x, 0, selector); }
inline void doubled_halves(uint32_t& low, uint32_t& high, uint32_t both) {
    low = (both & 0xFFFF) * 0x10001u, high = (both >> 16) * 0x10001u;
}
inline void zeros(float& a, float& b, float& c, float& d) { a = b = c = d = 0.0f; }
template <typename Head, typename Parity>
inline void next_stage(Head& head, Parity& parity, int stages) {
    if (++head == stages) head = 0, parity ^= 1;
}

}  // namespace emulate::ptx
