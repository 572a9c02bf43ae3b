// What a thread does that never pauses again: an access to memory that is not there, and an endless loop, end the launch too.
#pragma once
#include <machine.h>

#include <csignal>
#include <sys/time.h>

namespace emulate {

constexpr int PATIENCE_SECONDS = 10;  // of a processor's time between two pauses

inline void refused(int, siginfo_t* about, void*) { fail(text("an access to %p", about->si_addr)); }

inline void looked_after(int, siginfo_t*, void*) {
    if (machine.turns == machine.turns_before) fail("an endless loop");
    machine.turns_before = machine.turns;
}

struct Watch {
    static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGPROF};
    struct sigaction before[3];
    stack_t stack_before;
    itimerval timer_before;
    Watch() {
        static char room[64 << 10];  // a thread's own stack may be what is not there
        const stack_t stack = {room, 0, sizeof room};
        sigaltstack(&stack, &stack_before);
        struct sigaction action = {};
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
        for (int i = 0; i < 3; ++i) {
            action.sa_sigaction = SIGNALS[i] == SIGPROF ? looked_after : refused;
            sigaction(SIGNALS[i], &action, &before[i]);
        }
        const itimerval timer = {{PATIENCE_SECONDS, 0}, {PATIENCE_SECONDS, 0}};
        setitimer(ITIMER_PROF, &timer, &timer_before);
    }
    ~Watch() {
        setitimer(ITIMER_PROF, &timer_before, nullptr);
        for (int i = 0; i < 3; ++i) sigaction(SIGNALS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

}  // namespace emulate
