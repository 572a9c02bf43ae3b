// Copies that land late: those of the copy engine, counted by barriers in shared memory, and those that a thread starts. Bytes
// are read when they land: at any turn of the scheduler, in any order, or when somebody must have them.
#pragma once
#include <barriers.h>

namespace emulate {

// 8 bytes of shared memory.
struct CopyBarrier {
    uint8_t known, phase, expected, pending;
    int32_t bytes;  // that have still to come
};
constexpr uint8_t KNOWN = 0xB5;

inline uint8_t* shared_at(Block& block, unsigned address, unsigned bytes) {
    if (address + static_cast<uint64_t>(bytes) > block.shared_bytes || address % std::min(bytes, 16u) != 0)
        fail(text("%u bytes of shared memory at %u, of %u in all", bytes, address, block.shared_bytes));
    return block.shared + address;
}

inline CopyBarrier& barrier_at(Block& block, unsigned address) {
    CopyBarrier& barrier = *reinterpret_cast<CopyBarrier*>(shared_at(block, address, 8));
    if (barrier.known != KNOWN) fail(text("there is no barrier at %u of shared memory", address));
    return barrier;
}

inline void end_phase(Block& block, unsigned address) {
    CopyBarrier& barrier = barrier_at(block, address);
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.phase ^= 1, barrier.pending = barrier.expected;
    for (Thread& thread : block.threads)
        if (thread.wait == Wait::COPY && thread.number == address && thread.parity != barrier.phase) wake(thread);
}

inline void land(Block& block, size_t number) {
    const Copy copy = block.copies[number];
    block.copies[number] = block.copies.back();
    block.copies.pop_back();
    std::memcpy(copy.to, copy.from, copy.bytes);
    --machine.copying;
    machine.quiet = 0;
    barrier_at(block, copy.barrier).bytes -= static_cast<int32_t>(copy.bytes);
    end_phase(block, copy.barrier);
}

inline void land_own(Thread& thread, size_t number) {
    const Copy copy = thread.copies[number];
    thread.copies.erase(thread.copies.begin() + number);
    std::memcpy(copy.to, copy.from, copy.bytes);
}

inline void start_copy(unsigned target, const void* source, unsigned bytes) {
    Thread& me = *current;
    if (reinterpret_cast<uintptr_t>(source) % bytes != 0) fail(text("a copy of %u bytes from %p", bytes, source));
    me.copies.push_back({shared_at(*me.warp->block, target, bytes), static_cast<const uint8_t*>(source), bytes, me.group, 0});
}

// One of the copy engine's; false if there is none.
inline bool land_any() {
    if (machine.copying == 0) return false;
    size_t place = chance() % machine.blocks.size();
    while (machine.blocks[place]->copies.empty()) place = (place + 1) % machine.blocks.size();
    Block& block = *machine.blocks[place];
    land(block, chance() % block.copies.size());
    return true;
}
inline void land_one_of(Thread& thread) {
    if (!thread.copies.empty()) land_own(thread, chance() % thread.copies.size());
}

// Copies of all groups but the last `but`; those that belong to no group yet are not meant.
inline void wait_for_groups(unsigned but) {
    Thread& me = *current;
    for (size_t i = 0; i < me.copies.size();)
        if (me.copies[i].group + but < me.group) land_own(me, i);
        else ++i;
}

inline void wait_for_all_copies() {
    while (!current->copies.empty()) land_one_of(*current);
}

}  // namespace emulate
