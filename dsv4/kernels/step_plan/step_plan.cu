// step_plan: a decode step's row numbers and rotations; blockIdx.x is the row, blockIdx.y shares its wide results.
#include <cassert>
#include <dsv4/dependent.cuh>

using namespace dsv4;

namespace {

constexpr int THREADS = 256, PAGE = 64, MAX_KINDS = 2;

struct Kind {
    const int64_t* table;
    int64_t *phase, *write_to, *items, *entry_positions, *entry_to, *visible, *pages, *all_rows;
    float2* cis;
    int ratio, n, place, P, E;
    int64_t table_stride;
    int slots;
};
struct Step {
    const int64_t *slots, *positions;
    const float* freqs;
    int B, W, places, half;
    int64_t *window_rows, *window_to, *sequence;
    float2 *token_cis, *back_cis;
    Kind kinds[MAX_KINDS];
};

// The first kernel of a step: its code and what it reads lie in memory, weights having come since the last step. So it is
// short, with numbers of 32 bits where there are divisions, and all that is read is asked for at once.
__device__ __forceinline__ float2 turn(unsigned position, float freq) {
    float2 c;
    sincosf(__fmul_rn(static_cast<float>(position), freq), &c.y, &c.x);
    return c;
}

template <typename T>
__device__ __forceinline__ void ask_for_all(const T* from, int count) {
    constexpr int SECTOR = 32 / sizeof(T);
    for (int i = threadIdx.x * SECTOR; i < count; i += THREADS * SECTOR) ask_for(from + i);
}

__device__ __forceinline__ void plan_kind(const Kind& kind, const Step& step, int b, int64_t slot, unsigned position) {
    const bool live = slot >= 0;
    const int first = blockIdx.y * THREADS + threadIdx.x, every = gridDim.y * THREADS;
    const unsigned ratio = kind.ratio, entries = (position + 1) / ratio, n = kind.n;
    const bool done = live && entries * ratio == position + 1;
    const int visible = live ? entries : 0;
    const int64_t* table = kind.table + (live ? slot : 0) * kind.table_stride;
    assert((!live || slot < kind.slots) && "step_plan: a slot that the cache does not have");
    assert(visible <= static_cast<int64_t>(kind.P) * PAGE && "step_plan: a position beyond the pages planned for");
    for (int p = first; p < kind.P; p += every)
        kind.pages[static_cast<int64_t>(b) * kind.P + p] = static_cast<int64_t>(p) * PAGE < visible ? table[p] : -1;
    for (int e = first; e < kind.E; e += every)
        kind.all_rows[static_cast<int64_t>(b) * kind.E + e] = e < visible ? table[e / PAGE] * PAGE + e % PAGE : -1;
    if (blockIdx.y != 0) return;
    for (unsigned i = threadIdx.x; i < n; i += THREADS) {
        const unsigned back = n - 1 - i;  // oldest first
        kind.items[static_cast<int64_t>(b) * n + i] = done && back <= position ? slot * n + (position - back) % n : -1;
    }
    const unsigned entry_position = done ? position + 1 - ratio : 0;
    for (int i = threadIdx.x; i < step.half; i += THREADS)
        kind.cis[b * step.half + i] = turn(entry_position, step.freqs[kind.place * step.half + i]);
    if (threadIdx.x == 0) {
        const int entry = visible - 1;
        kind.phase[b] = live ? position % ratio : 0;
        kind.write_to[b] = live ? slot * n + position % n : -1;
        kind.entry_positions[b] = entry_position;
        kind.entry_to[b] = done ? table[entry / PAGE] * PAGE + entry % PAGE : -1;
        kind.visible[b] = visible;
    }
}

__global__ void __launch_bounds__(THREADS) step_plan(const __grid_constant__ Step step) {
    const int b = blockIdx.x;
    let_next_start();
    if (blockIdx.y == 0) ask_for_all(step.freqs, step.places * step.half);
    wait_for_previous();
    const int64_t slot = step.slots[b], given = step.positions[b];
    const bool live = slot >= 0;
    assert((!live || (given >= 0 && given < INT32_MAX)) && "step_plan: a negative position, or one of no sequence");
    const unsigned position = live ? given : 0, window = step.W;
#pragma unroll 1
    for (int k = 0; k < MAX_KINDS; ++k)
        if (live && slot < step.kinds[k].slots)
            ask_for_all(step.kinds[k].table + slot * step.kinds[k].table_stride, step.kinds[k].P);
#pragma unroll 1
    for (int k = 0; k < MAX_KINDS; ++k)
        if (step.kinds[k].table != nullptr) plan_kind(step.kinds[k], step, b, slot, position);
    if (blockIdx.y != 0) return;
    const unsigned oldest = position < window ? 0 : position - window + 1;
    for (unsigned i = threadIdx.x; i < window; i += THREADS) {
        const unsigned seen = oldest + i;
        step.window_rows[static_cast<int64_t>(b) * window + i] =
            live && seen <= position ? slot * window + seen % window : -1;
    }
    for (int i = threadIdx.x; i < step.places * step.half; i += THREADS) {
        const float2 c = turn(position, step.freqs[i]);
        const int at = (i / step.half * step.B + b) * step.half + i % step.half;
        step.token_cis[at] = c;
        step.back_cis[at] = make_float2(c.x, -c.y);
    }
    if (threadIdx.x == 0) {
        step.window_to[b] = live ? slot * window + position % window : -1;
        step.sequence[b] = live ? b : -1;
    }
}

#define KIND(k)                                                                                                    \
    const int64_t *table##k, int64_t *phase##k, int64_t *write_to##k, int64_t *items##k, int64_t *entry_positions##k, \
        int64_t *entry_to##k, int64_t *visible##k, int64_t *pages##k, int64_t *all_rows##k, float2 *cis##k,            \
        int ratio##k, int n##k, int place##k, int P##k, int E##k, int64_t table_stride##k, int slots##k
#define FIELDS(k)                                                                                                   \
    {table##k, phase##k, write_to##k, items##k, entry_positions##k, entry_to##k, visible##k, pages##k, all_rows##k, \
     cis##k, ratio##k, n##k, place##k, P##k, E##k, table_stride##k, slots##k}

}  // namespace

extern "C" int dsv4_step_plan(const int64_t* slots, const int64_t* positions, const float* freqs, int B, int W,
                              int places, int half, int64_t* window_rows, int64_t* window_to, int64_t* sequence,
                              float2* token_cis, float2* back_cis, KIND(0), KIND(1), cudaStream_t stream) {
    if (B == 0) return cudaSuccess;
    const Step step = {slots, positions, freqs, B, W, places, half, window_rows, window_to, sequence, token_cis,
                       back_cis, {FIELDS(0), FIELDS(1)}};
    int widest = 1;
    for (const Kind& kind : step.kinds) widest = max(widest, max(kind.P, kind.E));
    return launch_dependent(step_plan, B, (widest + 4 * THREADS - 1) / (4 * THREADS), THREADS, 0, stream, step);
}
