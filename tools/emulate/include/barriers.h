// Where threads of a block meet, and lanes of a warp: barriers, shuffles, votes.
#pragma once
#include <machine.h>

// A last parameter that nobody gives: where the call stands.
#define EMULATE_AT const char* file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATE_HERE (::emulate::Place{file, line})

namespace emulate {

inline void check_barrier(Block& block, unsigned number) {
    NamedBarrier& barrier = block.barriers[number];
    const unsigned expected = barrier.expected == 0 ? block.alive : barrier.expected;
    if (barrier.arrived == 0 || barrier.arrived < expected) return;
    barrier.arrived = 0, machine.quiet = 0;
    for (Thread* thread : barrier.waiting) wake(*thread);
    barrier.waiting.clear();
}

// expected: threads, 0 for all that are alive.
inline void meet(unsigned number, unsigned expected, bool waits, Place at) {
    Block& block = *current->warp->block;
    if (number >= NAMED_BARRIERS) fail(text("barrier %u at %s", number, place_text(at).c_str()));
    NamedBarrier& barrier = block.barriers[number];
    if (barrier.arrived > 0 && barrier.expected != expected)
        fail(text("barrier %u of %u threads at %s, where others wait for %u", number, expected, place_text(at).c_str(),
                  barrier.expected));
    barrier.expected = expected, ++barrier.arrived;
    if (waits) {
        barrier.waiting.push_back(current);
        Thread& me = *current;
        me.number = number, me.wait = Wait::BARRIER, me.what = "barrier", me.at = at;
        me.warp->runnable &= ~(1u << me.lane);
        check_barrier(block, number);
        pause(me);
    } else {
        check_barrier(block, number);
    }
}

// Lanes `mask` meet at the same `what`; the last one does finish(lanes, mask) for all.
template <typename Finish>
inline void together(unsigned mask, const char* what, Place at, Finish finish) {
    Thread& me = *current;
    Warp& warp = *me.warp;
    const unsigned mine = 1u << me.lane;
    if (!(mask & mine)) fail(text("%s of lanes %08x at %s, without the lane itself", what, mask, place_text(at).c_str()));
    me.what = what, me.mask = mask, me.at = at;
    warp.arrived |= mine;
    const unsigned expected = mask & warp.exist;
    unsigned here = 0;
    for (unsigned left = warp.arrived & expected; left != 0; left &= left - 1) {
        const Thread& other = warp.lanes[__builtin_ctz(left)];
        if (other.mask != mask) continue;
        if (std::strcmp(other.what, what) != 0)
            fail(text("%s at %s, while lane %d is at %s at %s", what, place_text(at).c_str(), other.lane, other.what,
                      place_text(other.at).c_str()));
        here |= 1u << other.lane;
    }
    if (here != expected) return sleep(Wait::LANES, what, at);
    finish(warp.lanes, expected);
    warp.arrived &= ~expected;
    if (!warp.looked) machine.quiet = 0;  // else they may ask each other whether it has come
    warp.looked = false;
    for (unsigned left = expected & ~mine; left != 0; left &= left - 1) wake(warp.lanes[__builtin_ctz(left)]);
}

// What lane from(lane) gives, where that is one of those that meet.
template <typename T, typename From>
inline T exchanged(unsigned mask, T value, const char* what, Place at, From from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
    std::memcpy(current->given, &value, sizeof value);
    current->given[2] = static_cast<uint32_t>(from(current->lane));
    together(mask, what, at, [](Thread* lanes, unsigned all) {
        for (unsigned left = all; left != 0; left &= left - 1) {
            Thread& to = lanes[__builtin_ctz(left)];
            const uint32_t* given = lanes[to.given[2]].given;
            to.taken[0] = given[0], to.taken[1] = given[1];
        }
    });
    std::memcpy(&value, current->taken, sizeof value);
    return value;
}

// The same number for all lanes, made of one from each.
template <typename Add>
inline uint32_t gathered(unsigned mask, uint32_t value, const char* what, Place at, uint32_t first, Add add) {
    current->given[0] = value;
    together(mask, what, at, [&](Thread* lanes, unsigned all) {
        uint32_t total = first;
        for (unsigned left = all; left != 0; left &= left - 1)
            total = add(total, lanes[__builtin_ctz(left)].given[0], __builtin_ctz(left));
        for (unsigned left = all; left != 0; left &= left - 1) lanes[__builtin_ctz(left)].taken[0] = total;
    });
    return current->taken[0];
}

}  // namespace emulate

inline void __syncthreads(EMULATE_AT) { emulate::meet(0, 0, true, EMULATE_HERE); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATE_AT) {
    emulate::together(mask, "__syncwarp", EMULATE_HERE, [](emulate::Thread*, unsigned) {});
}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATE_AT) {
    return emulate::exchanged(mask, value, "__shfl_sync", EMULATE_HERE,
                              [=](int me) { return (me & ~(width - 1)) | (lane & (width - 1)); });
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATE_AT) {
    return emulate::exchanged(mask, value, "__shfl_xor_sync", EMULATE_HERE, [=](int me) {
        const int from = me ^ bits;
        return from / width <= me / width ? from : me;
    });
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32, EMULATE_AT) {
    return emulate::exchanged(mask, value, "__shfl_up_sync", EMULATE_HERE, [=](int me) {
        return me % width >= static_cast<int>(step) ? me - static_cast<int>(step) : me;
    });
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32, EMULATE_AT) {
    return emulate::exchanged(mask, value, "__shfl_down_sync", EMULATE_HERE, [=](int me) {
        return me % width + static_cast<int>(step) < width ? me + static_cast<int>(step) : me;
    });
}

inline unsigned __ballot_sync(unsigned mask, bool yes, EMULATE_AT) {
    return emulate::gathered(mask, yes, "__ballot_sync", EMULATE_HERE, 0,
                             [](uint32_t a, uint32_t b, int lane) { return a | b << lane; });
}
inline bool __any_sync(unsigned mask, bool yes, EMULATE_AT) {
    return emulate::gathered(mask, yes, "__any_sync", EMULATE_HERE, 0, [](uint32_t a, uint32_t b, int) { return a | b; });
}
inline bool __all_sync(unsigned mask, bool yes, EMULATE_AT) {
    return emulate::gathered(mask, yes, "__all_sync", EMULATE_HERE, 1, [](uint32_t a, uint32_t b, int) { return a & b; });
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned x, EMULATE_AT) {
    return emulate::gathered(mask, x, "__reduce_add_sync", EMULATE_HERE, 0, [](uint32_t a, uint32_t b, int) { return a + b; });
}
inline int __reduce_add_sync(unsigned mask, int x, EMULATE_AT) {
    return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(x), file, line));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned x, EMULATE_AT) {
    return emulate::gathered(mask, x, "__reduce_or_sync", EMULATE_HERE, 0, [](uint32_t a, uint32_t b, int) { return a | b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned x, EMULATE_AT) {
    return emulate::gathered(mask, x, "__reduce_max_sync", EMULATE_HERE, 0,
                             [](uint32_t a, uint32_t b, int) { return a > b ? a : b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned x, EMULATE_AT) {
    return emulate::gathered(mask, x, "__reduce_min_sync", EMULATE_HERE, 0xffffffffu,
                             [](uint32_t a, uint32_t b, int) { return a < b ? a : b; });
}
inline int __reduce_max_sync(unsigned mask, int x, EMULATE_AT) {
    return static_cast<int>(__reduce_max_sync(mask, static_cast<unsigned>(x) ^ 0x80000000u, file, line) ^ 0x80000000u);
}
inline int __reduce_min_sync(unsigned mask, int x, EMULATE_AT) {
    return static_cast<int>(__reduce_min_sync(mask, static_cast<unsigned>(x) ^ 0x80000000u, file, line) ^ 0x80000000u);
}
