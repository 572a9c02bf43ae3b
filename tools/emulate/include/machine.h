// The machine: blocks of warps of threads, each thread a fiber, all of a grid running at once on one processor. In what order
// they go on follows from a seed: warps by chance, lanes of a warp one after the other from any one on, some held up.
#pragma once
#include <fibers.h>

#include <cstdarg>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace emulate {

struct Index3 {
    unsigned x, y, z;
};

enum class Wait { NOTHING, POLL, LANES, BARRIER, COPY, GONE };

// A place in a source.
struct Place {
    const char* file = "";
    int line = 0;
};

struct Copy {
    uint8_t* to;
    const uint8_t* from;
    unsigned bytes;
    unsigned group;    // of the thread's groups of copies
    unsigned barrier;  // where its bytes are counted, if it is a bulk copy
};

struct Block;
struct Warp;
struct Thread : Fiber {
    Warp* warp;
    Index3 index;
    int lane;
    Wait wait = Wait::NOTHING;
    const char* what = "";  // it waits for
    Place at;
    unsigned mask = 0, number = 0;      // of the lanes that meet; of the barrier, or the address and
    unsigned parity = 0;                // parity of the barrier of copies
    uint32_t given[12] = {}, taken[4] = {};  // to and from the other lanes
    unsigned group = 0;                 // of copies that it starts now
    std::vector<Copy> copies;
};

struct Warp {
    Block* block;
    int number;
    Thread* lanes;
    unsigned exist = 0, runnable = 0, arrived = 0;
    int listed = -1;  // its place among the warps that can go on
    uint64_t held_until = 0;  // a turn
};

struct NamedBarrier {
    unsigned expected = 0;
    std::vector<Thread*> waiting;
    unsigned arrived = 0;
};

struct Block {
    Index3 index;
    std::unique_ptr<uint8_t[]> room;
    uint8_t* shared;  // its shared memory
    unsigned shared_bytes;
    unsigned alive;
    std::vector<Warp> warps;
    std::vector<Thread> threads;
    std::vector<Copy> copies;  // of the copy engine
    NamedBarrier barriers[16];
};

constexpr unsigned STATIC_BYTES = 48 << 10;  // room in front of dynamic shared memory
constexpr uint64_t QUIET_TURNS = 3'000'000;  // of lanes that only look, one after the other: nothing comes any more

struct Machine {
    Index3 grid, threads;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<Warp*> ready;
    std::function<void()> kernel;
    uint64_t random_state = 1, quiet = 0, alive = 0, turns = 0;
    unsigned copying = 0;  // bulk copies under way
    bool failed = false;
    std::string message;
};

inline Machine machine;
inline Thread* current;
inline uint8_t* dynamic_memory;  // of the block that runs
inline uint64_t schedule = 0;    // the seed of the next launch

inline uint64_t chance() {
    uint64_t& s = machine.random_state;
    s ^= s << 13, s ^= s >> 7, s ^= s << 17;
    return s * 0x2545F4914F6CDD1Dull >> 16;
}

inline std::string text(const char* format, ...) {
    char buffer[1024];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

inline std::string place_text(const Place& at) {
    const char* name = std::strrchr(at.file, '/');
    return text("%s:%d", name == nullptr ? at.file : name + 1, at.line);
}

// The launch ends here, with an error.
[[noreturn]] inline void fail(const std::string& what) {
    const Thread& t = *current;
    machine.failed = true;
    machine.message = text("block %u, warp %d, lane %d: ", t.warp->block->index.x, t.warp->number, t.lane) + what;
    leave();
}

inline void list(Warp& warp) {
    if (warp.listed >= 0) return;
    warp.listed = static_cast<int>(machine.ready.size());
    machine.ready.push_back(&warp);
}

inline void strike(Warp& warp) {
    machine.ready.back()->listed = warp.listed;
    std::swap(machine.ready[warp.listed], machine.ready.back());
    machine.ready.pop_back();
    warp.listed = -1;
}

inline void wake(Thread& thread) {
    thread.wait = Wait::NOTHING;
    thread.warp->runnable |= 1u << thread.lane;
    list(*thread.warp);
    machine.quiet = 0;
}

// The running thread waits until it is woken.
inline void sleep(Wait wait, const char* what, Place at) {
    Thread& me = *current;
    me.wait = wait, me.what = what, me.at = at;
    me.warp->runnable &= ~(1u << me.lane);
    pause(me);
}

// It has looked at something that another may change, and may look again.
inline void looked(const char* what, Place at) {
    Thread& me = *current;
    me.wait = Wait::POLL, me.what = what, me.at = at;
    pause(me);
    me.wait = Wait::NOTHING;
}

void land(Block& block, size_t number);      // copies.h
void land_own(Thread& thread, size_t number);
void check_barrier(Block& block, unsigned number);

inline void body() {
    machine.kernel();
    Thread& me = *current;
    while (!me.copies.empty()) land_own(me, 0);
    Block& block = *me.warp->block;
    me.wait = Wait::GONE;
    me.warp->runnable &= ~(1u << me.lane), me.warp->exist &= ~(1u << me.lane);
    --machine.alive, --block.alive;
    machine.quiet = 0;
    for (unsigned number = 0; number < 16; ++number) check_barrier(block, number);
    leave();
}

inline void run_lane(Warp& warp, int lane) {
    Thread& thread = warp.lanes[lane];
    current = &thread;
    dynamic_memory = warp.block->shared + STATIC_BYTES;
    resume(thread, body);
    if (thread.wait == Wait::POLL) ++machine.quiet;
}

inline bool land_any() {
    if (machine.copying == 0) return false;
    for (size_t first = chance(), i = 0; i < machine.blocks.size(); ++i) {
        Block& block = *machine.blocks[(first + i) % machine.blocks.size()];
        if (block.copies.empty()) continue;
        land(block, chance() % block.copies.size());
        return true;
    }
    return false;
}

// Who waits where, lanes of a warp that do the same together.
inline std::string waits() {
    std::string found;
    int lines = 0;
    for (const auto& block : machine.blocks)
        for (const Warp& warp : block->warps)
            for (unsigned left = warp.exist; left != 0;) {
                const Thread& first = warp.lanes[__builtin_ctz(left)];
                unsigned alike = 0;
                for (int lane = 0; lane < 32; ++lane) {
                    const Thread& t = warp.lanes[lane];
                    if (left >> lane & 1 && t.wait == first.wait && t.at.line == first.at.line && t.number == first.number)
                        alike |= 1u << lane;
                }
                left &= ~alike;
                if (++lines > 60) continue;
                found += text("\n  block %u warp %d lanes %08x: %s", block->index.x, warp.number, alike, first.what);
                if (first.wait == Wait::BARRIER) found += text(" %u", first.number);
                if (first.wait == Wait::LANES) found += text(" of lanes %08x", first.mask);
                if (first.wait == Wait::COPY) found += text(" %u, parity %u", first.number, first.parity);
                found += " at " + place_text(first.at);
            }
    return lines > 60 ? found + text("\n  and %d more", lines - 60) : found;
}

// Until all threads have ended, or nobody can go on.
inline void run() {
    while (machine.alive > 0 && !machine.failed) {
        if (machine.ready.empty() || (machine.quiet > QUIET_TURNS && machine.copying == 0)) {
            if (machine.ready.empty() && land_any()) continue;
            machine.failed = true;
            machine.message = "nobody can go on:" + waits();
            return;
        }
        Warp* picked = machine.ready[chance() % machine.ready.size()];
        for (int i = 0; i < 4 && picked->held_until > machine.turns; ++i)
            picked = machine.ready[chance() % machine.ready.size()];
        Warp& warp = *picked;
        const uint64_t dice = chance();
        if ((dice >> 32) % 64 == 0) warp.held_until = machine.turns + chance() % 4096;  // unless no other can go on
        unsigned lanes = warp.runnable;
        if (dice % 8 == 0) lanes &= static_cast<unsigned>(chance());  // the others are held up
        const int first = dice >> 8 & 31;
        for (int i = 0; i < 32 && !machine.failed; ++i) {
            const int lane = (first + i) % 32;
            if (lanes & warp.runnable & 1u << lane) run_lane(warp, lane);
        }
        if (warp.runnable == 0 && warp.listed >= 0) strike(warp);
        if ((dice >> 16) % 4 == 0) land_any();
        if ((dice >> 24) % 4 == 0 && warp.exist != 0) {
            Thread& thread = warp.lanes[chance() % 32];
            if (!thread.copies.empty()) land_own(thread, chance() % thread.copies.size());
        }
        ++machine.turns;
    }
}

// One launch: every thread of the grid calls `kernel`.
inline bool launch(Index3 grid, Index3 threads, unsigned dynamic_bytes, std::function<void()> kernel) {
    machine.random_state = (schedule + 1) * 0x9E3779B97F4A7C15ull;
    machine.grid = grid, machine.threads = threads;
    machine.kernel = std::move(kernel);
    machine.blocks.clear(), machine.ready.clear();
    machine.quiet = machine.turns = machine.copying = 0;
    machine.failed = false;
    const unsigned per_block = threads.x * threads.y * threads.z, blocks = grid.x * grid.y * grid.z;
    machine.alive = static_cast<uint64_t>(per_block) * blocks;
    for (unsigned b = 0; b < blocks; ++b) {
        machine.blocks.push_back(std::make_unique<Block>());
        Block& block = *machine.blocks.back();
        block.index = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
        block.shared_bytes = STATIC_BYTES + dynamic_bytes, block.alive = per_block;
        block.room = std::make_unique<uint8_t[]>(block.shared_bytes + 1024);
        block.shared = block.room.get() + (1024 - reinterpret_cast<uintptr_t>(block.room.get()) % 1024);
        for (unsigned i = 0; i < block.shared_bytes / 4; ++i)  // what lies there first is anything
            reinterpret_cast<uint32_t*>(block.shared)[i] = static_cast<uint32_t>(chance());
        block.threads = std::vector<Thread>(per_block);
        block.warps = std::vector<Warp>((per_block + 31) / 32);
        for (unsigned t = 0; t < per_block; ++t) {
            Thread& thread = block.threads[t];
            Warp& warp = block.warps[t / 32];
            thread.warp = &warp, thread.lane = t % 32;
            thread.index = {t % threads.x, t / threads.x % threads.y, t / threads.x / threads.y};
            thread.stack = stack_of(static_cast<size_t>(b) * per_block + t);
            warp.exist |= 1u << thread.lane;
            if (thread.lane == 0) warp.block = &block, warp.number = t / 32, warp.lanes = &thread;
        }
        for (Warp& warp : block.warps) warp.runnable = warp.exist, list(warp);
    }
    run();
    return !machine.failed;
}

}  // namespace emulate
