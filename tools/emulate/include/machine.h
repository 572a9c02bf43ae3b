// The machine: blocks of warps of threads, each thread a fiber, all of a grid running at once on one processor.
#pragma once
#include <fibers.h>

#include <cstdarg>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace emulate {

constexpr unsigned NAMED_BARRIERS = 16;
constexpr unsigned STATIC_BYTES = 48 << 10;  // of shared memory, in front of what a launch asks for
constexpr unsigned SHARED_ALIGNED = 1024;

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
    unsigned mask = 0;                       // of the lanes that meet
    unsigned number = 0, parity = 0;         // of the barrier; of copies: its address
    uint32_t given[10] = {}, taken[4] = {};  // to and from the other lanes
    unsigned group = 0;                      // of copies that it starts now
    std::vector<Copy> copies;
};

struct Warp {
    Block* block;
    int number;
    Thread* lanes;
    unsigned exist = 0, runnable = 0, arrived = 0;
    bool looked = false;      // since its lanes met
    int listed = -1;          // its place among the warps that can go on
    uint64_t held_until = 0;  // a turn
};

struct NamedBarrier {
    unsigned expected = 0, arrived = 0;  // 0: all threads of the block
    std::vector<Thread*> waiting;
};

struct Grid;
struct Block {
    const Grid* grid;
    Index3 index;
    std::unique_ptr<uint8_t[]> room;
    uint8_t* shared;  // its shared memory
    unsigned shared_bytes;
    unsigned alive;
    std::vector<Warp> warps;
    std::vector<Thread> threads;
    std::vector<Copy> copies;  // of the copy engine
    NamedBarrier barriers[NAMED_BARRIERS];
};

// A launch.
struct Grid {
    int rank;
    Index3 size, threads;
    std::function<void()> kernel;
    std::vector<Block> blocks;
};

struct Machine {
    std::vector<std::unique_ptr<Grid>> grids;  // launches that run side by side
    std::vector<Block*> blocks;                // of all of them
    std::vector<Warp*> ready;
    uint64_t random_state = 1, quiet = 0, alive = 0, turns = 0, turns_before = ~0ull;
    unsigned copying = 0;  // bulk copies under way
    bool failed = false;
    std::string message;
};

inline Machine machine;
inline Thread* current;
inline uint8_t* dynamic_memory;  // of the block that runs

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

inline std::string name_of(const Warp& warp) {
    const Block& block = *warp.block;
    const std::string rank = machine.grids.size() > 1 ? text("rank %d ", block.grid->rank) : "";
    return rank + text("block %u warp %d", block.index.x, warp.number);
}

// The launch ends here, with an error.
[[noreturn]] inline void fail(const std::string& what) {
    const Thread& t = *current;
    machine.failed = true;
    machine.message = text("%s, lane %d: ", name_of(*t.warp).c_str(), t.lane) + what;
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
    me.warp->looked = true;
    pause(me);
    me.wait = Wait::NOTHING;
}

}  // namespace emulate
