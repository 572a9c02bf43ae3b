// Fibers: functions with a stack each, of which one runs at a time and says itself when another may go on.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <csignal>
#include <sys/mman.h>
#include <ucontext.h>

namespace emulate {

constexpr size_t STACK_BYTES = 128 << 10;

struct Fiber {
    jmp_buf here;
    char* stack = nullptr;
    bool begun = false;
};

// Stacks stay from one launch to the next. Memory is taken when it is touched.
inline char* stack_of(size_t number) {
    constexpr size_t COUNT = 512;
    static char* pools[1024] = {};
    char*& pool = pools[number / COUNT];
    if (pool == nullptr) {
        void* made = mmap(nullptr, COUNT * STACK_BYTES, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (made == MAP_FAILED) std::perror("emulate: no memory for stacks"), std::abort();
        pool = static_cast<char*>(made);
    }
    return pool + number % COUNT * STACK_BYTES;
}

inline jmp_buf scheduler;
inline ucontext_t scheduler_context;

// From the scheduler to a fiber, until that pauses. `begin` is what a fiber runs; it does not return.
inline __attribute__((noinline)) void resume(Fiber& fiber, void (*begin)()) {
    if (_setjmp(scheduler) != 0) return;
    if (fiber.begun) _longjmp(fiber.here, 1);
    fiber.begun = true;
    static ucontext_t first;
    getcontext(&first);
    first.uc_stack.ss_sp = fiber.stack, first.uc_stack.ss_size = STACK_BYTES, first.uc_link = nullptr;
    makecontext(&first, begin, 0);
    setcontext(&first);
}

// From a fiber to the scheduler, until it is resumed.
inline __attribute__((noinline)) void pause(Fiber& fiber) {
    if (_setjmp(fiber.here) == 0) _longjmp(scheduler, 1);
}
[[noreturn]] inline void leave() { _longjmp(scheduler, 1); }

}  // namespace emulate
