// Who goes on: warps by chance, lanes of a warp one after the other from any one on. Some are held up for a while.
#pragma once
#include <copies.h>
#include <watch.h>

namespace emulate {

constexpr uint64_t QUIET_TURNS = 3'000'000;  // of lanes that only look, one after the other: nothing comes any more

// What a fiber runs.
inline void body() {
    Thread& me = *current;
    Block& block = *me.warp->block;
    block.grid->kernel();
    wait_for_all_copies();
    me.wait = Wait::GONE;
    me.warp->runnable &= ~(1u << me.lane), me.warp->exist &= ~(1u << me.lane);
    --machine.alive, --block.alive;
    machine.quiet = 0;
    for (unsigned number = 0; number < NAMED_BARRIERS; ++number) check_barrier(block, number);
    leave();
}

inline void run_lane(Warp& warp, int lane) {
    Thread& thread = warp.lanes[lane];
    current = &thread;
    dynamic_memory = warp.block->shared + STATIC_BYTES;
    resume(thread, body);
    if (thread.wait == Wait::POLL) ++machine.quiet;
}

// Who waits where, lanes of a warp that do the same together.
inline std::string waits() {
    constexpr int LINES = 60;
    std::string found;
    int lines = 0;
    for (const Block* block : machine.blocks)
        for (const Warp& warp : block->warps)
            for (unsigned left = warp.exist; left != 0;) {
                const Thread& first = warp.lanes[__builtin_ctz(left)];
                unsigned alike = 0;
                for (unsigned others = left; others != 0; others &= others - 1) {
                    const Thread& t = warp.lanes[__builtin_ctz(others)];
                    const bool same = t.wait == first.wait && t.at.line == first.at.line && t.number == first.number;
                    alike |= same ? 1u << t.lane : 0;
                }
                left &= ~alike;
                if (++lines > LINES) continue;
                found += text("\n  %s lanes %08x: %s", name_of(warp).c_str(), alike, first.what);
                if (first.wait == Wait::BARRIER) found += text(" %u", first.number);
                if (first.wait == Wait::LANES) found += text(" of lanes %08x", first.mask);
                if (first.wait == Wait::COPY) found += text(" %u, parity %u", first.number, first.parity);
                found += " at " + place_text(first.at);
            }
    return lines > LINES ? found + text("\n  and %d more", lines - LINES) : found;
}

inline Warp& pick() {
    Warp* warp = machine.ready[chance() % machine.ready.size()];
    for (int i = 0; i < 4 && warp->held_until > machine.turns; ++i)
        warp = machine.ready[chance() % machine.ready.size()];
    return *warp;
}

inline void run_warp(Warp& warp) {
    const uint64_t dice = chance();
    const int first = dice & 31;
    unsigned lanes = warp.runnable;
    if ((dice >> 8) % 8 == 0) lanes &= static_cast<unsigned>(chance());  // the others are held up
    for (int i = 0; i < 32 && !machine.failed; ++i) {
        const int lane = (first + i) % 32;
        if (lanes & warp.runnable & 1u << lane) run_lane(warp, lane);
    }
    if (warp.runnable == 0 && warp.listed >= 0) strike(warp);
    if ((dice >> 16) % 64 == 0) warp.held_until = machine.turns + chance() % 4096;
    if ((dice >> 24) % 4 == 0) land_any();
    const int other = dice >> 40 & 31;
    if ((dice >> 32) % 4 == 0 && warp.exist >> other & 1) land_one_of(warp.lanes[other]);
    ++machine.turns;
}

// Until all threads have ended, or nobody can go on.
inline void run() {
    const Watch watch;
    while (machine.alive > 0 && !machine.failed) {
        if (!machine.ready.empty() && (machine.quiet < QUIET_TURNS || machine.copying > 0)) {
            run_warp(pick());
        } else if (!land_any()) {
            machine.failed = true;
            machine.message = "nobody can go on:" + waits();
        }
    }
}

}  // namespace emulate
