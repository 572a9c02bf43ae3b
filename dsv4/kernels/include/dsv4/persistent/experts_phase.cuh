// EXPERTS: of a layer's feed-forward part all that is behind ROUTE. A block multiplies with its tiles of gate and up, and,
// when all blocks have met, with its rows of down for every expert, which it adds up per token. Tiles are cut into
// pieces, which the warps take in turn; sums of slices wait in shared memory to be added up in their order. The arithmetic
// is that of moe_few.cuh, and so are the bits.
#pragma once
#include <dsv4/fragments.cuh>
#include <dsv4/persistent/experts_plan.cuh>
#include <dsv4/persistent/meeting.cuh>

namespace dsv4::persistent {

// A pass is over tiles of a block whose sums can wait at once: some of gate and up, or those of down for some groups.
struct Pass {
    bool down;
    int from, to;         // tiles
    int place, group;     // of down: of the first row that is staged; the group behind the last one
};

// Where a lane leaves sums of slices, its rows of tokens 2 t and 2 t + 1, and then begins anew.
struct Slots {
    float* at;
    int step;   // to the next token
    int count;  // of tokens that are there, from 2 t on

    __device__ __forceinline__ void take(float (&even)[4], float (&odd)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i % 2 < count) at[i % 2 * step + i / 2 * 8] = even[i] + odd[i];
#pragma unroll
        for (int i = 0; i < 4; ++i) even[i] = odd[i] = 0.0f;
        at += 16;
    }
};

// The warp's pieces of a pass, whose rows are staged; `done`: of all its pieces so many.
static __device__ __forceinline__ void multiply(const Experts& a, const Units& units, const Pass& pass, int& done, Feed& feed) {
    const ExpertsWork& w = work<ExpertsWork>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int blocks = pass.down ? a.second.blocks : a.first.blocks, cuts = moe::cuts_of(blocks);
    const int halvings = a.halvings[pass.down], width = a.width[pass.down], stride = moe::stride_of(blocks);
    const int end = pass.down ? units.all : units.up, most = w.plan.most;
    Stream& stream = feed.stream;
#pragma unroll 1
    for (; done < end; ++done) {
        const Routed piece = {nullptr, 0, w.list[warp][done & (PIECES - 1)].what};
        if (piece.number() >= pass.to) break;
        if (done > 0 && (done & (AHEAD - 1)) == 0)
            list_units(a, units, w.plan.group[lane], w.plan.group[lane + 32], done + AHEAD, AHEAD);
        // Beyond the last token any row will do: nobody takes the sum.
        const int place = piece.first() + min(g, piece.count() - 1), row = pass.down ? place - pass.place : w.plan.token[place];
        const int begin = moe::piece_begin(blocks, piece.piece(), halvings);
        const uint8_t* x = work_at<uint8_t>(STAGED_AT) + row * stride + begin * 128 + 32 * t;
        const int slice = piece.piece() << (cuts - halvings);
        const int slot = (((piece.number() - pass.from) * most + 2 * t) << cuts) + slice;
        Slots slots = {work_at<float>(a.parked) + slot * 16 + g, 16 << cuts, piece.count() - 2 * t};
        float even[4] = {}, odd[4] = {};
        if (width > 0) {  // whole chunks: a slice is two, one or half of one
            int left = max(width / moe::CHUNK_BLOCKS, 1);
#pragma unroll 1
            do {
                const uint8_t* block = stream.wait();
                w4::Lane parts[moe::CHUNK_BLOCKS];
#pragma unroll
                for (int k = 0; k < moe::CHUNK_BLOCKS; ++k) parts[k] = w4::load(block + k * w4::BLOCK_BYTES, lane);
#pragma unroll
                for (int k = 0; k < moe::CHUNK_BLOCKS; ++k) {
                    moe::multiply_block(even, odd, parts[k], x + k * 128);
                    if (k == 1 && width == 2) slots.take(even, odd);
                }
                x += moe::CHUNK_BLOCKS * 128;
                if (--left == 0) slots.take(even, odd);
                feed.refill();
            } while (left > 0);
        } else {
            const int last = (piece.piece() + 1) << (cuts - halvings), over = moe::piece_begin(blocks, piece.piece() + 1, halvings);
            const uint8_t* block = nullptr;
            int at = begin, used = 0;  // blocks of the row, and of the chunk
#pragma unroll 1
            for (int s = slice; s < last; ++s, slots.take(even, odd)) {
                const int stop = (s + 1) * blocks >> cuts;
#pragma unroll 1
                for (; at < stop; x += 128) {
                    if (used == 0) block = stream.wait();
                    moe::multiply_block(even, odd, w4::load(block + used * w4::BLOCK_BYTES, lane), x);
                    ++at, ++used;
                    if (used < moe::CHUNK_BLOCKS && at < over) continue;
                    feed.refill();
                    used = 0;
                }
            }
        }
    }
}

// Adds up the slices of a pass. A thread has rows g and g + 8 of a tile and a token: of gate and of up, or both of down.
static __device__ __forceinline__ void collect(const Experts& a, const Units& units, const Pass& pass) {
    const ExpertsWork& w = work<ExpertsWork>();
    const int cuts = moe::cuts_of(pass.down ? a.second.blocks : a.first.blocks), most = w.plan.most;
#pragma unroll 1
    for (int i = threadIdx.x; i < (pass.to - pass.from) * most * 8; i += THREADS) {
        const int g = i & 7, slot = i >> 3, number = moe::quotient(slot, most), m = slot - number * most;
        const int2 tile = units.find(a, pass.down, pass.from + number);
        const uint32_t group = w.plan.group[tile.x];
        if (m >= static_cast<int>(group >> 22)) continue;
        const int place = (group >> 16 & 63) + m, row = pass.down ? place - pass.place : w.plan.token[place];
        const float* sum = work_at<float>(a.parked) + (slot << cuts) * 16 + g;
        const float* undo = work_at<float>(a.undo) + row * moe::MOST_SLICES;
        float low = 0.0f, high = 0.0f;
#pragma unroll 8
        for (int s = 0; s < 1 << cuts; ++s) low += __fmul_rn(sum[s * 16], undo[s]), high += __fmul_rn(sum[s * 16 + 8], undo[s]);
        const float* alpha = w.alpha[tile.x];
        if (pass.down) {
            bf16* result = work_at<bf16>(a.results) + (tile.y * a.tokens * a.first.topk + place) * 16 + g;
            result[0] = from_float<bf16>(low * (alpha[2] * w4::UNDO));
            result[8] = from_float<bf16>(high * (alpha[2] * w4::UNDO));
        } else {
            a.first.out[static_cast<int64_t>(place) * 8 * a.first.rows + 8 * tile.y + g] = moe::activated(
                low * (alpha[0] * w4::UNDO), high * (alpha[1] * w4::UNDO), a.first.limit, w.plan.weight[place]);
        }
    }
}

// Of the block's rows of the result that which comes i-th.
struct Element {
    int tile, token, at;  // at: in the result

    __device__ __forceinline__ Element(const Experts& a, const Units& units, int i) : tile(moe::quotient(i >> 4, a.tokens)) {
        token = (i >> 4) - tile * a.tokens, at = (token * a.second.rows + units.first_tile + tile) * 16 + (i & 15);
    }
    __device__ __forceinline__ uint32_t bits(const Experts& a) const {  // of the shared expert
        return a.out_f32 ? static_cast<const uint32_t*>(a.shared)[at] : static_cast<const uint16_t*>(a.shared)[at] << 16;
    }
};

// The block's rows of the result: a token's experts by rising place, then the shared one. added: it, of the first element
// that this thread has.
static __device__ __forceinline__ void add_up(const Experts& a, const Units& units, uint32_t added) {
    const ExpertsWork& w = work<ExpertsWork>();
    const int topk = a.first.topk;
#pragma unroll 1
    for (int first = threadIdx.x, i = first; i < units.tiles * a.tokens * 16; i += THREADS) {
        const Element element(a, units, i);
        const int at = element.at, token = element.token;
        const bf16* result = work_at<bf16>(a.results) + element.tile * a.tokens * topk * 16 + (i & 15);
        if (i != first) added = element.bits(a);
        float y = 0.0f;
#pragma unroll 4
        for (int k = 0; k < topk; ++k) {
            const int place = w.plan.places[token * topk + k];
            const float one = to_float(result[max(place, 0) * 16]);
            y += place < 0 ? 0.0f : one;
        }
        y += __uint_as_float(added);
        if (a.peers.size > 0) a.peers.tell_all(token, at - token * a.second.rows * 16, y, position().numbers[token]);
        else if (a.out_f32) static_cast<float*>(a.out)[at] = y;
        else static_cast<bf16*>(a.out)[at] = from_float<bf16>(y);
    }
}

// Every thread calls, after come() behind the phase in front, which does not write x: stages it.
static __device__ __forceinline__ void experts_ahead(int turn) {
    const Experts& a = payload<Experts>(turn);
    const int warp = moe::uniform(threadIdx.x / 32);
    number_rows(a.peers, a.tokens);
    moe::Staging<1> rows(a.first.x, a.first.x_row, a.tokens, a.first.columns, a.first.blocks);
    rows.load(warp);
    rows.finish(warp, work_at<uint8_t>(STAGED_AT), work_at<float>(a.undo));
}

// The plan is there, which is all that the phase begins with: what else ROUTE leaves is read behind a meeting.
static __device__ __forceinline__ void wait_for_plan(int turn) {
    if (threadIdx.x == SPEAKER) {
        const unsigned number = plan_number(phase_at(turn).number - 1);
        while (exchange::arrived(&payload<Experts>(turn).plan->number) != number) {}
    }
    __syncthreads();
}

static __device__ __forceinline__ void experts_phase(int turn, const Meetings& meetings, Stream& stream) {
    const Experts& a = payload<Experts>(turn);
    ExpertsWork& w = work<ExpertsWork>();
    const int thread = threadIdx.x, lane = thread % 32, warp = moe::uniform(thread / 32);
    if (thread < static_cast<int>(sizeof(RoutePlan)) / 16)
        start_copy16(shared_address(&w.plan) + thread * 16, reinterpret_cast<const uint8_t*>(a.plan) + thread * 16);
    copies_commit();
    const int4 head = *reinterpret_cast<const int4*>(a.plan);  // groups, most, each, more
    const uint32_t low = a.plan->group[lane], high = a.plan->group[lane + 32];
    stream.pass();  // what the list says of these weights
    const Units units(a, head.x, head.z, head.w);
    list_units(a, units, low, high, 0, PIECES);
    if (thread < head.x) {  // nobody waits for them until sums are collected: weights are on their way in front of them
        const int expert = (warp == 0 ? low : high) & 0xFFFF;
        copy_async8(w.alpha[thread], a.first.alpha + 2 * expert);
        copy_async4(w.alpha[thread] + 2, a.second.alpha + expert);
    }
    copies_commit();
    Feed feed = {stream, w.list[warp], units.all};
    feed.fill(1);  // and no more at first: whatever else the phase begins with would wait behind full rings
    int done = 0;
    uint32_t added = 0;
    Pass pass = {false, 0, 0, 0, 0};
    copies_wait_but<1>();
#pragma unroll 1
    while (true) {
#pragma unroll 1
        do {
            __syncthreads();
            if (!pass.down) pass.from = pass.to, pass.to = min(units.count, pass.from + w.plan.fit);
            if (done == 0) feed.fill(stream.stages);
            multiply(a, units, pass, done, feed);
            wait_for_copies();
            __syncthreads();
            collect(a, units, pass);
        } while (!pass.down && pass.to < units.count);
        if (pass.down) {
            __syncthreads();  // nobody reads the rows any more, and all results are there
        } else {
            meetings.all();
            if (thread < units.tiles * a.tokens * 16) added = Element(a, units, thread).bits(a);
        }
        if (pass.group == head.x) break;
        // Groups from this one on whose rows have room.
        pass.place = w.plan.group[pass.group] >> 16 & 63;
        const auto ends = [&](int group) {
            const uint32_t word = w.plan.group[group];
            return __ballot_sync(moe::ALL, group < head.x && int((word >> 16 & 63) + (word >> 22)) <= pass.place + a.room);
        };
        const int next = min(__popc(ends(lane)) + __popc(ends(lane + 32)), pass.group + w.plan.together);
        const uint32_t last = w.plan.group[next - 1];
        const int places = (last >> 16 & 63) + (last >> 22) - pass.place;
        pass.down = true, pass.from = pass.group * units.tiles, pass.to = next * units.tiles, pass.group = next;
        moe::Staging<1> rows(a.second.x + pass.place * a.second.x_row, a.second.x_row, places, a.second.columns, a.second.blocks);
        rows.load(warp);
        rows.finish(warp, work_at<uint8_t>(STAGED_AT), work_at<float>(a.undo));
    }
    add_up(a, units, added);
}

// plan, shared: what ROUTE leaves; out [T, D]; mid: scratch [T topk, F]. grid: the launch's. Refuses what does not fit into
// work_bytes. size > 0: the ranks, of mhc_seam, whom the result is told; the next phase is that seam.
static cudaError_t describe_experts(Phase* phase, const void* plan, const void* shared, const void* x, int64_t x_row,
                                    const void* w13_tiles, const float* w13_alpha, const void* w2_tiles, const float* w2_alpha,
                                    void* mid, void* out, int out_f32, int tokens, int topk, int D, int F, float limit,
                                    uint64_t* const* inboxes, uint32_t* turns, int rank, int size, int grid,
                                    int work_bytes) {
    const ExpertsLayout layout(tokens, topk, D, F, grid, work_bytes);
    if (reinterpret_cast<uintptr_t>(x) % 16 || x_row % 8 || layout.least > work_bytes) return cudaErrorInvalidValue;
    const auto job_of = [&](const void* tiles, const float* alpha, const void* from, int64_t row, void* to, int rows, int width) {
        return moe::Job{static_cast<const uint8_t*>(tiles), alpha, static_cast<const bf16*>(from), row, nullptr, nullptr,
                        static_cast<bf16*>(to), {}, topk, rows, (width + 63) / 64, width, limit};
    };
    Experts a = {};
    a.plan = static_cast<const RoutePlan*>(plan), a.shared = shared;
    a.first = job_of(w13_tiles, w13_alpha, x, x_row, mid, F / 8, D);
    a.second = job_of(w2_tiles, w2_alpha, mid, F, nullptr, D / 16, F);
    a.out = out, a.out_f32 = out_f32, a.tokens = tokens, a.of_block = {D / 16 / grid, D / 16 % grid};
    for (int down = 0; down < 2; ++down) {
        const int blocks = down ? a.second.blocks : a.first.blocks, cuts = moe::cuts_of(blocks), width = blocks >> cuts;
        while (a.halvings[down] < cuts && blocks >> (a.halvings[down] + 1) >= moe::CHUNK_BLOCKS) ++a.halvings[down];
        const bool whole = blocks % (1 << cuts) == 0 && (width == 2 || width == 4 || width == 8);
        a.width[down] = whole ? width : 0;
    }
    a.room = layout.room, a.undo = layout.undo, a.results = layout.results, a.parked = layout.parked;
    a.peers = mhc::peers_of(inboxes, turns, nullptr, 0, rank, size);
    if (const cudaError_t error = fill_phase(phase, EXPERTS, a)) return error;
    phase->joined = size > 0 ? NEXT : 0;
    return cudaSuccess;
}

}  // namespace dsv4::persistent
