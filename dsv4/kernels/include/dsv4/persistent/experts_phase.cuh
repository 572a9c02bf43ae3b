// EXPERTS: of a layer's feed-forward part all but its first projections. Every block routes and sorts all pairs for itself,
// and asks for its routed weights. Meanwhile it multiplies what the shared expert makes with its rows of the second product.
// Then come its tiles of gate and up, and, when all blocks have met, its rows of down for every expert, which it adds up
// per token. The arithmetic is that of router.cuh, swiglu.cuh, linear.cuh and moe_few.cuh, and so are the bits.
#pragma once
#include <dsv4/persistent/experts_plan.cuh>
#include <dsv4/persistent/meeting.cuh>

namespace dsv4::persistent {

// Scores of all experts, and the shared expert's activation, for all to see after a barrier. Returns the
// expert of a hash layer that this lane is to enter. A thread takes a score or so of the first rows and four columns of
// the last.
static __device__ __forceinline__ int64_t score_and_activate(const Experts& a) {
    constexpr int AT_ONCE = 4;
    const int thread = threadIdx.x, warp = thread / 32, scores = a.tokens * a.keys, quads = a.second.columns / 4;
    uint8_t* const staged = work_at<uint8_t>(STAGED_AT);
    float* const score = reinterpret_cast<float*>(staged + a.tokens * shared_stride(a.slices));
    uint32_t* const key = reinterpret_cast<uint32_t*>(score + scores);
    int64_t named = -1;
#pragma unroll 1
    for (int begin = 0; begin < max(scores, a.tokens * quads); begin += AT_ONCE * THREADS) {
        float logit[AT_ONCE], bias[AT_ONCE];
        uint2 gate[AT_ONCE] = {}, up[AT_ONCE] = {};
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const int at = begin + j * THREADS + thread, token = moe::quotient(at, a.keys), e = at - token * a.keys;
            const bool exists = at < scores && e < a.route.experts;
            logit[j] = exists ? a.route.logits[token * a.route.stride + e] : 0.0f;
            bias[j] = exists && a.route.bias != nullptr ? a.route.bias[e] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const int at = begin + j * THREADS + (thread ^ THREADS / 2), token = moe::quotient(at, quads);
            const int column = 4 * (at - token * quads);
            if (token >= a.tokens) break;
            gate[j] = *reinterpret_cast<const uint2*>(a.gate + token * a.gate_stride + column);
            up[j] = *reinterpret_cast<const uint2*>(a.up + token * a.up_stride + column);
        }
        if (begin == 0) {
            const int token = WARPS - 1 - warp;
            if (a.route.tid2eid != nullptr && token < a.tokens) named = routing::expert_of_token(a.route, token);
        }
#pragma unroll 1
        for (int j = 0, at = begin + thread; j < AT_ONCE && at < scores; ++j, at += THREADS) {
            const bool exists = at - moe::quotient(at, a.keys) * a.keys < a.route.experts;
            const float s = routing::score(logit[0]);
            score[at] = s, key[at] = exists ? routing::order(s + bias[0]) : 0;
#pragma unroll
            for (int k = 0; k + 1 < AT_ONCE; ++k) logit[k] = logit[k + 1], bias[k] = bias[k + 1];
        }
#pragma unroll 1
        for (int j = 0, at = begin + (thread ^ THREADS / 2); j < AT_ONCE; ++j, at += THREADS) {
            const int token = moe::quotient(at, quads), column = 4 * (at - token * quads);
            if (token >= a.tokens) break;
            const uint32_t g[2] = {gate[0].x, gate[0].y}, u[2] = {up[0].x, up[0].y};
            bf16 y[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int high = k % 2 ? 0 : 16;
                y[k] = from_float<bf16>(swiglu(__uint_as_float(g[k / 2] << high & 0xFFFF0000u),
                                               __uint_as_float(u[k / 2] << high & 0xFFFF0000u), a.first.limit));
            }
            *reinterpret_cast<uint2*>(staged + token * shared_stride(a.slices) + column * 2) =
                make_uint2(y[0].bits | y[1].bits << 16, y[2].bits | y[3].bits << 16);
#pragma unroll
            for (int k = 0; k + 1 < AT_ONCE; ++k) gate[k] = gate[k + 1], up[k] = up[k + 1];
        }
    }
    return named;
}

// The last warps pick the experts of a token each; the first bring the shared expert's slices to the form in which they
// are multiplied.
static __device__ __forceinline__ void pick_and_stage(const Experts& a, moe::FewPlan& pairs, int64_t named) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = WARPS - 1 - warp, topk = a.route.topk;
    const int stride = shared_stride(a.slices);
    uint8_t* const staged = work_at<uint8_t>(STAGED_AT);
    if (token < a.tokens) {
        const float* score = reinterpret_cast<const float*>(staged + a.tokens * stride) + token * a.keys;
        const uint32_t* key = reinterpret_cast<const uint32_t*>(score + a.tokens * a.keys);
        int64_t chosen = named;
        if (a.route.tid2eid == nullptr)
            chosen = a.keys == 256 ? routing::best_of<8>(key, topk) : routing::best_of<12>(key, topk);
        const bool exists = lane < topk && chosen >= 0 && chosen < a.route.experts;
        const float weight = routing::weight_of(a.route, exists ? score[chosen] : 0.0f);
        if (exists) pairs.expert[token * topk + lane] = static_cast<int>(chosen), pairs.given[token * topk + lane] = weight;
    }
    float* const undo = work_at<float>(a.shared_undo);
#pragma unroll 1
    for (int task = warp; task < a.tokens * a.slices; task += WARPS) {
        const int row = moe::quotient(task, a.slices), slice = task - row * a.slices;
        uint4* const here = reinterpret_cast<uint4*>(staged + row * stride + slice * 1024 + lane * 32);
        uint4 low = make_uint4(0, 0, 0, 0), high = low;
        if (slice * SLICE + lane * 16 < a.second.columns) low = here[0], high = here[1];
        uint32_t x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        const float back = a.shared.format == linear::PLAIN ? 1.0f : scale_to_f16(x);
        here[0] = make_uint4(x[0], x[1], x[2], x[3]), here[1] = make_uint4(x[4], x[5], x[6], x[7]);
        if (lane == 0) undo[slice * TOKENS + row] = back;
    }
}

// The shared expert's second product, for the block's rows of down.
static __device__ __forceinline__ void multiply_shared(const Experts& a, const moe::Share& share, Feed& feed) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint8_t* const staged = work_at<uint8_t>(STAGED_AT);
    const linear::Rows<1> rows(a.tokens, shared_stride(a.slices));
    const auto next = [](Feed& f) { f.refill(); };
#pragma unroll 1
    for (int unit = threadIdx.x / 32; unit < share.tiles * a.slices; unit += WARPS) {
        const int tile = moe::quotient(unit, a.slices), slice = unit - tile * a.slices;
        float sum[1][1][4];
        linear::slice_product(sum, a.shared, a.shared.format, share.first_tile + tile, 1, slice,
                              min(a.second.blocks - slice * linear::SLICE_BLOCKS, linear::SLICE_BLOCKS),
                              staged + slice * 1024, rows, feed, next);
        linear::undo_scaling(sum, a.shared.format, work_at<float>(a.shared_undo) + slice * TOKENS);
        float* slot = work_at<float>(a.slots) + unit * a.tokens * 16 + g;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (2 * t + i % 2 < a.tokens) slot[(2 * t + i % 2) * 16 + i / 2 * 8] = sum[0][0][i];
    }
}

// Rows g and g + 8 of token m of a group's tile.
static __device__ __forceinline__ void put_pair(const Experts& a, const ExpertsPlan& plan, bool down, int2 tile, int m, int g,
                                                float low, float high) {
    const int place = plan.pairs.groups[tile.x].y + m;
    const float* alpha = plan.alpha[tile.x];
    if (down) {
        bf16* result = work_at<bf16>(a.results) + (tile.y * a.tokens * a.route.topk + place) * 16 + g;
        result[0] = from_float<bf16>(low * (alpha[2] * w4::UNDO));
        result[8] = from_float<bf16>(high * (alpha[2] * w4::UNDO));
    } else {
        a.first.out[static_cast<int64_t>(place) * 8 * a.first.rows + 8 * tile.y + g] =
            moe::activated(low * (alpha[0] * w4::UNDO), high * (alpha[1] * w4::UNDO), a.first.limit, plan.pairs.weight[place]);
    }
}

// The warp's pieces of a pass, whose rows are staged; `done`: of all its pieces so many.
static __device__ __forceinline__ void multiply(int turn, const moe::Share& share, int parks, const Pass& pass, int& done,
                                                Feed& feed) {
    const Experts& a = payload<Experts>(turn);
    const ExpertsPlan& plan = work<ExpertsPlan>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int blocks = pass.down ? a.second.blocks : a.first.blocks, stride = moe::stride_of(blocks);
    const float* const undo = work_at<float>(a.undo);
#pragma unroll 1
    for (int left = pass.cut.of_warp(); left > 0; --left, ++done) {
        if (done > 0 && done % AHEAD == 0) list_pieces(turn, share, parks, done + AHEAD, AHEAD);
        const Routed piece = plan.list[warp][done % PIECES];
        const int4 group = plan.pairs.groups[piece.group()];
        // Where the group's token m is staged. Beyond the last token any row will do: nobody takes the sum.
        const auto row_of = [&](int m) {
            const int place = group.y + min(m, group.z - 1);
            return pass.down ? place - pass.batch.from : plan.pairs.token[place];
        };
        const int halvings = piece.halvings(), slot = (piece.number() << moe::cuts_of(blocks)) * a.tokens * 16;
        const Parked park = {halvings > 0 ? work_at<float>(a.parked) + slot : nullptr, a.tokens};
        float sum[4];
        moe::tile_product(sum, blocks, piece.piece(), halvings, lane,
                          work_at<uint8_t>(STAGED_AT) + row_of(g) * stride + 32 * t,
                          undo + row_of(2 * t) * moe::MOST_SLICES, undo + row_of(2 * t + 1) * moe::MOST_SLICES, feed,
                          park);
        if (halvings > 0) continue;
        const int2 tile = make_int2(piece.group(), piece.tile());
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (2 * t + i < group.z) put_pair(a, plan, pass.down, tile, 2 * t + i, g, sum[i], sum[i + 2]);
    }
}

// Adds up what has been parked. A thread has two rows of a tile and a token.
static __device__ __forceinline__ void collect(const Experts& a, const ExpertsPlan& plan, const moe::Share& share,
                                               const Pass& pass, int tiles) {
    const int cuts = moe::cuts_of(pass.down ? a.second.blocks : a.first.blocks), step = a.tokens * 16;
#pragma unroll 1
    for (int i = threadIdx.x; i < tiles * a.tokens * 8; i += THREADS) {
        const int g = i % 8, number = moe::quotient(i / 8, a.tokens), m = i / 8 - number * a.tokens;
        const int2 tile = pass.find(a, share, pass.cut.whole + number);
        if (m >= plan.pairs.groups[tile.x].z) continue;
        const float* slot = work_at<float>(a.parked) + (number << cuts) * step + m * 16 + g;
        float low = 0.0f, high = 0.0f;
#pragma unroll 8
        for (int slice = 0; slice < 1 << cuts; ++slice, slot += step) low += slot[0], high += slot[8];
        put_pair(a, plan, pass.down, tile, m, g, low, high);
    }
}

// The block's rows of the result: a token's experts by rising place, then the shared one.
static __device__ __forceinline__ void add_up(const Experts& a, const moe::FewPlan& pairs, const moe::Share& share) {
    const int topk = a.route.topk, step = a.tokens * 16;
#pragma unroll 1
    for (int i = threadIdx.x; i < share.tiles * step; i += THREADS) {
        const int tile = moe::quotient(i / 16, a.tokens), token = i / 16 - tile * a.tokens, row = i % 16;
        const bf16* result = work_at<bf16>(a.results) + tile * a.tokens * topk * 16 + row;
        const float* slot = work_at<float>(a.slots) + tile * a.slices * step + token * 16 + row;
        float y = 0.0f, other = 0.0f;
#pragma unroll 4
        for (int slice = 0; slice < a.slices; ++slice) other += slot[slice * step];
        other *= a.shared.alpha;
#pragma unroll 4
        for (int k = 0; k < topk; ++k) {
            const int place = pairs.places[token * topk + k];
            const float one = to_float(result[max(place, 0) * 16]);
            y += place < 0 ? 0.0f : one;
        }
        y += a.out_f32 ? other : rounded<bf16>(other);
        const int64_t to = static_cast<int64_t>(token) * 16 * a.second.rows + (share.first_tile + tile) * 16 + row;
        if (a.out_f32) static_cast<float*>(a.out)[to] = y;
        else static_cast<bf16*>(a.out)[to] = from_float<bf16>(y);
    }
}

static __device__ __forceinline__ void stage_rows(const Experts& a, moe::Staging<4> rows) {
    rows.load(threadIdx.x / 32);
    rows.finish(threadIdx.x / 32, work_at<uint8_t>(STAGED_AT), work_at<float>(a.undo));
}

static __device__ __forceinline__ void experts_phase(int turn, Meetings& meetings, Stream& stream) {
    const Experts& a = payload<Experts>(turn);
    ExpertsPlan& plan = work<ExpertsPlan>();
    const int thread = threadIdx.x, lane = thread % 32, warp = moe::uniform(thread / 32);
    const int64_t named = score_and_activate(a);
    if (thread < moe::FEW_PAIRS) moe::enter_pair(plan.pairs, moe::NOBODY, 0.0f);
    __syncthreads();
    pick_and_stage(a, plan.pairs, named);
    moe::Share share = moe::plan_few(plan.pairs, a.tokens, a.route.topk);
    moe::deal(share, a.first.rows, a.of_block);
    // A token that names an expert twice would need more room.
    const bool crowded = plan.pairs.leads[lane].y > a.tokens || plan.pairs.leads[lane + 32].y > a.tokens;
    const int parks = __any_sync(moe::ALL, crowded) ? 0 : a.parks;

    Pass pass(a, share, parks);
    list_pieces(turn, share, parks, 0, PIECES);
    Feed feed = {stream, plan.list[warp]};
#pragma unroll 1
    for (int i = 0; i < stream.stages; ++i) feed.ask();
    int done = 0;
    float alpha[3] = {};
    if (thread < share.groups) {
        const int expert = plan.pairs.groups[thread].x;
        alpha[0] = a.first.alpha[2 * expert], alpha[1] = a.first.alpha[2 * expert + 1], alpha[2] = a.second.alpha[expert];
    }
    multiply_shared(a, share, feed);
    if (thread < share.groups)
#pragma unroll
        for (int i = 0; i < 3; ++i) plan.alpha[thread][i] = alpha[i];
    __syncthreads();  // nobody reads the shared expert's rows any more
    stage_rows(a, moe::Staging<4>(a.first.x, a.first.x_row, a.tokens, a.first.columns, a.first.blocks));
#pragma unroll 1
    while (true) {
        __syncthreads();
        multiply(turn, share, parks, pass, done, feed);
        __syncthreads();
        if (pass.cut.halvings > 0) collect(a, plan, share, pass, (pass.cut.end - pass.cut.whole) >> pass.cut.halvings);
        if (!pass.down) meetings.all();
        if (!pass.next(a, share, parks)) break;
        stage_rows(a, moe::Staging<4>(a.second.x + pass.batch.from * a.second.x_row, a.second.x_row,
                                      pass.batch.to - pass.batch.from, a.second.columns, a.second.blocks));
    }
    __syncthreads();
    add_up(a, plan.pairs, share);
}

// out [T, D]; mid: scratch [T topk, F]. F: columns of the shared expert too. grid: the launch's. Refuses what does not fit
// into work_bytes.
static cudaError_t describe_experts(Phase* phase, const float* logits, int64_t logits_stride, const float* bias,
                                    const int64_t* tid2eid, const int64_t* token_ids, int64_t vocabulary, float route_scale,
                                    const void* x, int64_t x_row, const void* gate, int64_t gate_stride, const void* up,
                                    int64_t up_stride, const linear::Part* shared_w2, const void* w13_tiles,
                                    const float* w13_alpha, const void* w2_tiles, const float* w2_alpha, void* mid, void* out,
                                    int out_f32, int tokens, int experts, int topk, int D, int F, float limit, int grid,
                                    int work_bytes) {
    const int pairs = tokens * topk;
    if (tokens < 1 || tokens > TOKENS || topk < 1 || topk > 32 || pairs > moe::FEW_PAIRS || experts < topk || experts > 384)
        return cudaErrorInvalidValue;
    if (D < 16 || D % 16 || F < 16 || F % 16 || D > 128 * 64 || F > 128 * 64 || grid < 1 || grid > MAX_BLOCKS)
        return cudaErrorInvalidValue;
    if (reinterpret_cast<uintptr_t>(x) % 16 || x_row % 8 || reinterpret_cast<uintptr_t>(gate) % 8 || gate_stride % 4 ||
        reinterpret_cast<uintptr_t>(up) % 8 || up_stride % 4 || shared_w2->row_scale != nullptr || shared_w2->rows != D)
        return cudaErrorInvalidValue;
    const auto job_of = [&](const void* tiles, const float* alpha, const void* from, int64_t row, void* to, int rows, int width) {
        return moe::Job{static_cast<const uint8_t*>(tiles), alpha, static_cast<const bf16*>(from), row, nullptr, nullptr,
                        static_cast<bf16*>(to), {}, topk, rows, (width + 63) / 64, width, limit};
    };
    Experts a = {};
    a.route = {logits, bias, tid2eid, token_ids, nullptr, nullptr, experts, topk, logits_stride, vocabulary, route_scale};
    a.first = job_of(w13_tiles, w13_alpha, x, x_row, mid, F / 8, D);
    a.second = job_of(w2_tiles, w2_alpha, mid, F, nullptr, D / 16, F);
    a.shared = *shared_w2;
    a.gate = static_cast<const bf16*>(gate), a.up = static_cast<const bf16*>(up);
    a.gate_stride = gate_stride, a.up_stride = up_stride;
    a.out = out, a.out_f32 = out_f32, a.tokens = tokens, a.keys = experts <= 256 ? 256 : 384;
    a.slices = (F + SLICE - 1) / SLICE, a.of_block = {D / 16 / grid, D / 16 % grid};

    const int tiles = (D / 16 + grid - 1) / grid, slot = tokens * 16 * 4, row = moe::stride_of(a.second.blocks);
    const int first = max(tokens * moe::stride_of(a.first.blocks), tokens * (shared_stride(a.slices) + a.keys * 8));
    const int fixed = STAGED_AT + a.slices * TOKENS * 4 + tiles * a.slices * slot + tiles * pairs * 32;
    const auto staged = [&](int room) { return max(first, room * row) + max(tokens, room) * moe::MOST_SLICES * 4; };
    a.room = min(pairs, TOKENS);
    if (fixed + staged(a.room) > work_bytes) return cudaErrorInvalidValue;
    const int left = work_bytes - fixed - staged(a.room), most = (WARPS - 1) << moe::cuts_of(max(a.first.blocks, a.second.blocks));
    const int parks = min(most, left / 2 / slot);
    while (a.room < pairs && fixed + staged(a.room + 1) + parks * slot <= work_bytes) ++a.room;
    a.parks = min(most, (work_bytes - fixed - staged(a.room)) / slot);
    a.undo = STAGED_AT + max(first, a.room * row), a.shared_undo = a.undo + max(tokens, a.room) * moe::MOST_SLICES * 4;
    a.slots = a.shared_undo + a.slices * TOKENS * 4, a.results = a.slots + tiles * a.slices * slot;
    a.parked = a.results + tiles * pairs * 32;
    return fill_phase(phase, EXPERTS, a);
}

}  // namespace dsv4::persistent
