// A launch: blocks with shared memory that holds anything, and their threads. Several launches may run side by side, as those
// of ranks do that meet in each other's memory.
#pragma once
#include <schedule.h>

namespace emulate {

inline uint64_t seed = 0;  // of the next launch
inline int ranks = 1;      // launches that run side by side

inline void set_up(Block& block, const Grid& grid, unsigned number, unsigned dynamic_bytes) {
    static size_t stacks = 0;
    if (machine.blocks.empty()) stacks = 0;
    const unsigned count = grid.threads.x * grid.threads.y * grid.threads.z;
    block.grid = &grid, block.alive = count;
    block.index = {number % grid.size.x, number / grid.size.x % grid.size.y, number / grid.size.x / grid.size.y};
    block.shared_bytes = STATIC_BYTES + dynamic_bytes;
    block.room = std::make_unique<uint8_t[]>(block.shared_bytes + SHARED_ALIGNED);
    block.shared = block.room.get() + (-reinterpret_cast<uintptr_t>(block.room.get()) & (SHARED_ALIGNED - 1));
    for (unsigned i = 0; i < block.shared_bytes / 4; ++i)
        reinterpret_cast<uint32_t*>(block.shared)[i] = static_cast<uint32_t>(chance());
    block.threads = std::vector<Thread>(count);
    block.warps = std::vector<Warp>((count + 31) / 32);
    for (unsigned t = 0; t < count; ++t) {
        Thread& thread = block.threads[t];
        Warp& warp = block.warps[t / 32];
        thread.warp = &warp, thread.lane = t % 32, thread.stack = stack_of(stacks++);
        thread.index = {t % grid.threads.x, t / grid.threads.x % grid.threads.y, t / grid.threads.x / grid.threads.y};
        if (thread.lane == 0) warp.block = &block, warp.number = t / 32, warp.lanes = &thread;
        warp.exist |= 1u << thread.lane;
    }
    machine.blocks.push_back(&block), machine.alive += count;
    for (Warp& warp : block.warps) warp.runnable = warp.exist, list(warp);
}

// Every thread of the grid calls `kernel`, now or when the other ranks' launches have come. Whether that went well.
inline bool launch(Index3 size, Index3 threads, unsigned dynamic_bytes, std::function<void()> kernel) {
    if (machine.grids.empty()) machine.random_state = (seed + 1) * 0x9E3779B97F4A7C15ull;
    const int rank = static_cast<int>(machine.grids.size());
    machine.grids.push_back(std::make_unique<Grid>());
    Grid& grid = *machine.grids.back();
    grid.rank = rank, grid.size = size, grid.threads = threads, grid.kernel = std::move(kernel);
    grid.blocks = std::vector<Block>(size.x * size.y * size.z);
    for (unsigned number = 0; number < grid.blocks.size(); ++number)
        set_up(grid.blocks[number], grid, number, dynamic_bytes);
    if (rank + 1 < ranks) return true;
    run();
    const bool ended = !machine.failed;
    std::string message = std::move(machine.message);
    machine = Machine();
    machine.message = std::move(message);
    return ended;
}

}  // namespace emulate
