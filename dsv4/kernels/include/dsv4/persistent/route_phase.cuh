// ROUTE: what is behind the first projections of a layer's feed-forward part and in front of EXPERTS. The last block is told
// the logits one by one, routes all tokens, sorts the pairs and tells them to all, and then their weights; meanwhile the
// others multiply what the shared expert makes, as LINEAR does it, of an input that each makes for itself, and work out who
// has to do what. The arithmetic is that of router.cuh and swiglu.cuh, and so are the bits.
#pragma once
#include <dsv4/persistent/experts_plan.cuh>
#include <dsv4/persistent/linear_phase.cuh>
#include <dsv4/router.cuh>

namespace dsv4::persistent {

// Lies where a product has its second part and those behind it: here it has one.
struct Route {
    routing::Arguments route;  // without what it writes, and without logits
    const uint64_t* logits;    // [T, experts] words, told by the phase in front
    const bf16* x;             // what EXPERTS multiply, and how far apart rows are
    int64_t x_row;
    int width, staged;         // D; where in the work area EXPERTS have it
    uint64_t* plan;            // words of every place: the pair; then its weight
    const bf16 *gate, *up;     // [T, F]
    int64_t gate_stride, up_stride;
    float limit;
    int keys;         // experts, rounded up to what the lanes of a warp have
    int rows;         // tiles of gate and up of a group
    int activated;    // where in the work area: [T, F]
};
static_assert(sizeof(Route) <= (MOST_PARTS - 1) * sizeof(linear::Part), "there is place");

static __device__ __forceinline__ const Route& route_of(const Linear& product) {
    return *reinterpret_cast<const Route*>(product.parts + 1);
}

// The product's input, behind its own work area, where find_work() has it lie. The phase behind is known then.
template <bool ONE>
static __device__ __forceinline__ void activate(int turn) {
    constexpr int AT_ONCE = ONE ? 2 : 8;
    const Linear& product = payload<Linear>(turn);
    const Route& a = route_of(product);
    bf16* const activated = work_at<bf16>(a.activated);
    const int thread = threadIdx.x, across = product.columns / 2, pairs = rows_of<ONE>(product.tokens) * across;
#pragma unroll 1
    for (int begin = thread; begin < pairs; begin += AT_ONCE * THREADS) {
        uint32_t gate[AT_ONCE] = {}, up[AT_ONCE] = {};
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const int at = begin + j * THREADS, token = ONE ? 0 : moe::quotient(at, across), column = 2 * (at - token * across);
            if (at >= pairs) break;
            gate[j] = *reinterpret_cast<const uint32_t*>(a.gate + token * a.gate_stride + column);
            up[j] = *reinterpret_cast<const uint32_t*>(a.up + token * a.up_stride + column);
        }
#pragma unroll 1
        for (int at = begin; at < min(pairs, begin + AT_ONCE * THREADS); at += THREADS) {
            const auto one = [&](int shift) {
                return uint32_t{from_float<bf16>(swiglu(__uint_as_float(gate[0] << shift & 0xFFFF0000u),
                                                        __uint_as_float(up[0] << shift & 0xFFFF0000u), a.limit)).bits};
            };
            reinterpret_cast<uint32_t*>(activated)[at] = one(16) | one(0) << 16;
#pragma unroll
            for (int k = 0; k + 1 < AT_ONCE; ++k) gate[k] = gate[k + 1], up[k] = up[k + 1];
        }
    }
    wait_for_copies();
    __syncthreads();
}

// Every token's experts and their weights, which all blocks are told, of the logits that this one is told. A warp picks the
// experts of a token, a lane each, and finds the place of each among all pairs.
template <bool ONE>
static __device__ __forceinline__ void pick(int turn) {
    constexpr int AT_ONCE = ONE ? 1 : 4;
    const Linear& product = payload<Linear>(turn);
    const Route& a = route_of(product);
    const int tokens = rows_of<ONE>(product.tokens);
    const uint32_t number = told_by(phase_at(turn).number - 1);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, scores = tokens * a.keys, topk = a.route.topk;
    int* const order = work_at<int>(0);  // of pairs: by expert, then by pair
    float* const score = reinterpret_cast<float*>(order + moe::FEW_PAIRS);
    uint32_t* const key = reinterpret_cast<uint32_t*>(score + scores);
    int64_t chosen = -1;
    if (a.route.tid2eid != nullptr && warp < tokens) chosen = routing::expert_of_token(a.route, warp);
    const auto expert_of = [&](int at) { return at - moe::quotient(at, a.keys) * a.keys; };
    const auto exists = [&](int at) { return at < scores && expert_of(at) < a.route.experts; };
    if (thread < moe::FEW_PAIRS) order[thread] = INT_MAX;
#pragma unroll 1
    for (int begin = thread; begin < scores; begin += AT_ONCE * THREADS) {
        exchange::Value logit[AT_ONCE] = {};
        float bias[AT_ONCE];
        bool waits;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const int at = begin + j * THREADS;
            bias[j] = exists(at) && a.route.bias != nullptr ? a.route.bias[expert_of(at)] : 0.0f;
        }
        do {
            waits = false;
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const int at = begin + j * THREADS, token = moe::quotient(at, a.keys);
                if (!exists(at) || logit[j].turn == number) continue;
                logit[j] = exchange::look_at_value(a.logits + token * a.route.experts + expert_of(at));
                waits |= logit[j].turn != number;
            }
        } while (waits);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const int at = begin + j * THREADS;
            if (at >= scores) break;
            const float s = routing::score(logit[j].value);
            score[at] = s, key[at] = exists(at) ? routing::order(s + bias[j]) : 0;
        }
    }
    __syncthreads();
    float picked = 0.0f;
    int expert = NO_EXPERT, mine = 0;
    if (warp < tokens) {
        if (a.route.tid2eid == nullptr)
            chosen = a.keys == 256 ? routing::best_of<8>(key + warp * a.keys, topk)
                                   : routing::best_of<12>(key + warp * a.keys, topk);
        const bool there = lane < topk && chosen >= 0 && chosen < a.route.experts;
        if (there) expert = static_cast<int>(chosen), picked = score[warp * a.keys + chosen];
        mine = expert * moe::FEW_PAIRS + warp * topk + lane;
        if (lane < topk) order[warp * topk + lane] = mine;
    }
    if (tokens > 1) __syncthreads();
    else __syncwarp();
    if (warp >= tokens) return;
    int place = 0;
#pragma unroll 2
    for (int i = 0; i < tokens * topk; i += 4) {
        const int4 four = *reinterpret_cast<const int4*>(order + i);
        place += (four.x < mine) + (four.y < mine) + (four.z < mine) + (four.w < mine);
    }
    const uint32_t own = told_by(phase_at(turn).number);
    if (lane < topk) exchange::tell_peer(a.plan + place, __uint_as_float(expert | warp << 16), own);
    const float weight = routing::weight_of(a.route, picked);  // who asks for weights of experts need not wait for these
    if (lane < topk) exchange::tell_peer(a.plan + moe::FEW_PAIRS + place, weight, own);
}

// Whether this block routes: it meets nobody before, as it is told the logits.
static __device__ __forceinline__ bool routes() { return blockIdx.x == gridDim.x - 1; }

// Every thread calls, after come() behind the phase in front: find_work() then knows where the product's input will lie,
// and the bias comes to the L2 cache. Of one row what EXPERTS multiply is staged, which was there before the phase in
// front; of more it would take longer than the wait.
template <bool ONE>
static __device__ __forceinline__ void route_ahead(int turn) {
    Linear& product = const_cast<Linear&>(payload<Linear>(turn));
    const Route& a = route_of(product);
    const int line = threadIdx.x * 32, warp = moe::uniform(threadIdx.x / 32);
    if (ONE && warp != SPEAKER / 32) {
        moe::Staging<1, WARPS - 1> row(a.x, a.x_row, 1, a.width, (a.width + 63) / 64);
        row.load(warp);
        row.finish(warp, work_at<uint8_t>(a.staged), work_at<float>(UNDO_AT));
    }
    if (routes() && a.route.bias != nullptr && line < a.route.experts) ask_for(a.route.bias + line);
    if (threadIdx.x == 0) product.parts[0].x = work_at<bf16>(a.activated);
    __syncthreads();
}

// By the speaker's warp, when it has nothing else to do: EXPERTS begins with the plan. The block that routes has met nobody:
// before it comes to the next meeting all must have come to the last one, and they have long.
template <bool ONE>
static __device__ __forceinline__ void hear_plan(int turn, const Meetings& meetings) {
    if (routes()) meetings.see_all();
    const Linear& product = payload<Linear>(turn);
    const Route& a = route_of(product);
    receive_plan(a.plan, rows_of<ONE>(product.tokens) * a.route.topk, a.rows, told_by(phase_at(turn).number));
}

__host__ __device__ constexpr int keys_of(int experts) { return experts <= 256 ? 256 : 384; }

// Where the product has its sums, Made and its input. Of one row EXPERTS begin before the sums are added up, and their row
// is staged before: these lie behind what they have there then. tiles: of a block at most.
struct RouteLayout {
    int slots, made, input, end;

    RouteLayout(int tokens, int tiles, int F, const ExpertsLayout& experts) {
        const int slices = (F + SLICE - 1) / SLICE, own = tokens * (slices * 1024 + 16) + slices * TOKENS * 4;
        slots = tokens > 1 ? own : experts.parked[0];
        made = max(slots + tiles * slices * tokens * 64, MADE_LEAST);
        input = made + tiles * static_cast<int>(sizeof(Made)), end = input + tokens * F * 2;
    }
};
static int route_work_bytes(int tokens, int experts, int topk, int D, int F, int grid) {
    const int tiles = (D / 16 + max(grid - 1, 1) - 1) / max(grid - 1, 1);
    const RouteLayout product(tokens, tiles, F, ExpertsLayout(tokens, topk, D, F, grid, 0));
    return max(moe::FEW_PAIRS * 4 + tokens * keys_of(experts) * 8, product.end);
}

// logits [T, experts]: words, which the phase in front tells. shared_w2: its x is not given; cuts [grid + 1]: the blocks'
// tiles of it. plan: words of all places. The rest as EXPERTS has it.
static cudaError_t describe_route(Phase* phase, const void* logits, const float* bias, const int64_t* tid2eid,
                                  const int64_t* token_ids, int64_t vocabulary, float route_scale, const void* x,
                                  int64_t x_row, const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
                                  const linear::Part* shared_w2, const uint16_t* cuts, void* plan, int tokens, int experts,
                                  int topk, int D, int F, float limit, int grid, int work_bytes) {
    const int pairs = tokens * topk;
    if (tokens < 1 || tokens > TOKENS || topk < 1 || topk > 32 || pairs > moe::FEW_PAIRS || experts < topk || experts > 384)
        return cudaErrorInvalidValue;
    if (D < 16 || D % 16 || F < 16 || F % 16 || D > 128 * 64 || F > 128 * 64 || grid < 2 || grid > MAX_BLOCKS)
        return cudaErrorInvalidValue;
    if (reinterpret_cast<uintptr_t>(gate) % 4 || gate_stride % 2 || reinterpret_cast<uintptr_t>(up) % 4 || up_stride % 2 ||
        reinterpret_cast<uintptr_t>(plan) % 8 || reinterpret_cast<uintptr_t>(logits) % 8 || !aligned16(x) || x_row % 8 ||
        cuts[grid - 1] != cuts[grid] || shared_w2->row_scale != nullptr || shared_w2->rows != D)
        return cudaErrorInvalidValue;
    const ExpertsLayout layout(tokens, topk, D, F, grid, work_bytes);
    if (max(layout.least, route_work_bytes(tokens, experts, topk, D, F, grid)) > work_bytes) return cudaErrorInvalidValue;
    linear::Part part = *shared_w2;
    part.x = nullptr, part.x_stride = F, part.x_wide = 1;
    if (const cudaError_t error = describe_linear(phase, &part, 1, cuts, grid, tokens, F, nullptr, 0.0f, 0, nullptr, nullptr, 0, 0)) return error;
    Route a = {};
    a.route = {nullptr, bias, tid2eid, token_ids, nullptr, nullptr, experts, topk, 0, vocabulary, route_scale};
    a.logits = static_cast<const uint64_t*>(logits);
    a.x = static_cast<const bf16*>(x), a.x_row = x_row, a.width = D, a.staged = layout.staged;
    a.plan = static_cast<uint64_t*>(plan);
    a.gate = static_cast<const bf16*>(gate), a.up = static_cast<const bf16*>(up);
    a.gate_stride = gate_stride, a.up_stride = up_stride, a.limit = limit, a.keys = keys_of(experts);
    a.rows = F / 8;
    int most = 0;
    for (int b = 0; b < grid; ++b) most = max(most, cuts[b + 1] - cuts[b]);
    const RouteLayout own(tokens, most, F, layout);
    Linear& product = *reinterpret_cast<Linear*>(phase->payload);
    if (tokens == 1 && product.slots_at > UNDO_AT) return cudaErrorInvalidValue;  // what EXPERTS multiply begins there
    if (own.end > work_bytes) return cudaErrorInvalidValue;
    product.slots_at = own.slots, product.made_at = own.made, a.activated = own.input;
    std::memcpy(product.parts + 1, &a, sizeof(a));
    phase->kind = ROUTE, phase->joined = NEXT;
    return cudaSuccess;
}

}  // namespace dsv4::persistent
