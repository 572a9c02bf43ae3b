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
    int to;            // tiles, with those of the passes in front
    int from;          // number of the first sum
    int place, group;  // of down: of the first row that is staged; the group behind the last one
    int parked;        // where the sums are
};

// Sums of all groups are numbered one after the other: by tile, then by pair. `across`: tiles of a group. What one is of,
// if it is there.
struct Sum {
    int group, first, tile, pair;  // first: place
    bool there;

    __device__ __forceinline__ Sum(const RoutePlan& plan, int across, int number) {
        const int place = moe::quotient(number, across);  // in its group
        there = static_cast<unsigned>(place) < static_cast<unsigned>(plan.pairs);
        group = plan.of[there ? place : 0];
        const uint32_t word = plan.group[group];
        const int count = word >> 22;
        first = word >> 16 & 63, tile = moe::quotient(number - first * across, count);
        pair = number - first * across - tile * count;
    }
};

// Where a lane leaves its rows g and g + 8 of tokens 2 t and 2 t + 1 of the slice, and then begins anew.
// slice: of the piece, from its last one on.
struct Slots {
    uint8_t* at;
    int step;          // to the next token
    int count, token;  // tokens that are there; 2 t

    __device__ __forceinline__ void take(float (&even)[4], float (&odd)[4], int slice) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float2 sum = make_float2(even[i] + odd[i], even[i + 2] + odd[i + 2]);
            if (token + i < count) *reinterpret_cast<float2*>(at + i * step + slice * SLOT_BYTES) = sum;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) even[i] = odd[i] = 0.0f;
    }
};

// The warp's pieces of a pass, whose rows are staged; `done`: of all its pieces so many.
static __device__ __forceinline__ void multiply(const Experts& a, const Units& units, const Pass& pass, int& done, Feed& feed) {
    const ExpertsWork& w = work<ExpertsWork>();
    const RoutePlan& plan = routed_plan();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int blocks = pass.down ? a.second.blocks : a.first.blocks, cuts = moe::cuts_of(blocks);
    const int halvings = a.halvings[pass.down], width = a.width[pass.down], stride = moe::stride_of(blocks);
    const int end = (pass.down ? units.up : 0) + units.pieces(pass.to << halvings), step = SLOT_BYTES << cuts;
    const uint8_t* const staged = work_at<uint8_t>(a.staged) + 32 * t - (pass.down ? pass.place * stride : 0);
    uint8_t* const slots_at = work_at<uint8_t>(pass.parked) + (2 * t - pass.from) * step + 8 * g;
    const bool whole = __any_sync(moe::ALL, width > 0), halves = __any_sync(moe::ALL, width == 2);  // votes: known to be uniform
    Stream& stream = feed.stream;
#pragma unroll 1
    while (done < end) {
        if (done > 0 && (done & (AHEAD - 1)) == 0) {
            list_units(a, units, plan.group[lane], plan.group[lane + 32], done + AHEAD, AHEAD);
            place_units(a, units, done + AHEAD, AHEAD);
        }
        const int stop = min(end, (done | (AHEAD - 1)) + 1);  // as far as the list does not begin anew
        const Placed* next = w.placed[warp] + (done & (PIECES - 1));
#pragma unroll 1
        for (; done < stop; ++done, ++next) {
            const Placed piece = *next;
            const uint8_t* x = staged + piece.x + static_cast<int>(piece.rows >> 4 * g & 15) * stride;
            const Slots slots = {slots_at + piece.slot, step, piece.count, 2 * t};
            float even[4] = {}, odd[4] = {};
            if (whole) {  // a slice is two chunks, one or half of one
                int left = width;
#pragma unroll 1
                do {
                    const uint8_t* block = stream.wait();
                    w4::Lane parts[moe::CHUNK_BLOCKS];
#pragma unroll
                    for (int k = 0; k < moe::CHUNK_BLOCKS; ++k) parts[k] = w4::load(block + k * w4::BLOCK_BYTES, lane);
                    moe::multiply_block(even, odd, parts[0], x);
                    moe::multiply_block(even, odd, parts[1], x + 128);
                    if (halves) slots.take(even, odd, -1);
                    moe::multiply_block(even, odd, parts[2], x + 256);
                    moe::multiply_block(even, odd, parts[3], x + 384);
                    feed.refill();
                    x += moe::CHUNK_BLOCKS * 128, left -= moe::CHUNK_BLOCKS;
                } while (left > 0);
                slots.take(even, odd, 0);
            } else {
                const Routed unit = {nullptr, 0, w.list[warp][done & (PIECES - 1)].what};
                const int first = unit.piece() << (cuts - halvings), last = (unit.piece() + 1) << (cuts - halvings);
                const int over = moe::piece_begin(blocks, unit.piece() + 1, halvings);
                const uint8_t* block = nullptr;
                int at = moe::piece_begin(blocks, unit.piece(), halvings), used = 0;  // blocks of the row, and of the chunk
#pragma unroll 1
                for (int s = first; s < last; slots.take(even, odd, ++s - last)) {
                    const int until = (s + 1) * blocks >> cuts;
#pragma unroll 1
                    for (; at < until; x += 128) {
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
}

// What a thread adds up of a pass: rows g and g + 8 of a tile, of a token of its group.
struct Total {
    int slot, place, row, group, tile;
    bool there;

    __device__ __forceinline__ Total(const Experts& a, const Units& units, const Pass& pass, int i) : slot(i >> 3) {
        const RoutePlan& plan = routed_plan();
        const int across = pass.down ? units.tiles : a.first.rows, begin = pass.down ? 0 : units.begin;
        const Sum sum(plan, across, pass.from + slot);
        there = sum.there && static_cast<unsigned>(sum.group * across + sum.tile - begin) < static_cast<unsigned>(pass.to);
        if (!there) return;
        group = sum.group, tile = sum.tile, place = sum.first + sum.pair;
        row = pass.down ? place - pass.place : plan.token[place];
    }
};

// Adds up the slices of a pass, when all of the block have come: of gate and of up, or both of down. Behind a barrier.
template <bool ONE>
static __device__ __forceinline__ void collect(const Experts& a, const Units& units, const Pass& pass) {
    const ExpertsWork& w = work<ExpertsWork>();
    const int cuts = moe::cuts_of(pass.down ? a.second.blocks : a.first.blocks), g = threadIdx.x & 7;
    int i = threadIdx.x;
    Total total(a, units, pass, i);  // while others multiply
    wait_for_copies();
    __syncthreads();
#pragma unroll 1
    for (; total.there; i += THREADS, total = Total(a, units, pass, i)) {
        const float2* sums = work_at<float2>(pass.parked) + (total.slot << cuts) * 8 + g;
        const float4* undo = work_at<float4>(UNDO_AT) + total.row * (moe::MOST_SLICES / 4);
        const float* alpha = w.alpha[total.group];
        float low = 0.0f, high = 0.0f;
#pragma unroll 2
        for (int s = 0; s < 1 << cuts; s += 4, sums += 32) {
            const float4 four = *undo++;
            const float back[] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int k = 0; k < 4; ++k) low += __fmul_rn(sums[k * 8].x, back[k]), high += __fmul_rn(sums[k * 8].y, back[k]);
        }
        if (pass.down) {
            const int pairs = rows_of<ONE>(a.tokens) * a.first.topk;
            bf16* result = work_at<bf16>(a.results) + (total.tile * pairs + total.place) * 16 + g;
            result[0] = from_float<bf16>(low * (alpha[2] * w4::UNDO));
            result[8] = from_float<bf16>(high * (alpha[2] * w4::UNDO));
        } else {
            a.first.out[static_cast<int64_t>(total.place) * 8 * a.first.rows + 8 * total.tile + g] =
                moe::activated(low * (alpha[0] * w4::UNDO), high * (alpha[1] * w4::UNDO), a.first.limit,
                               routed_plan().weight[total.place]);
        }
    }
}

// Of the block's rows of the result that which comes i-th.
template <bool ONE>
struct Element {
    int tile, token, at;  // at: in the result

    __device__ __forceinline__ Element(const Experts& a, const Units& units, int i) {
        const int tokens = rows_of<ONE>(a.tokens);
        tile = moe::quotient(i >> 4, tokens), token = (i >> 4) - tile * tokens;
        at = (token * a.second.rows + units.first_tile + tile) * 16 + (i & 15);
    }
    __device__ __forceinline__ int column(const Experts& a) const { return at - token * a.second.rows * 16; }
    __device__ __forceinline__ uint32_t bits(const Experts& a) const {  // of the shared expert
        return a.out_f32 ? static_cast<const uint32_t*>(a.shared)[at] : static_cast<const uint16_t*>(a.shared)[at] << 16;
    }
};

// The block's rows of the result, when all of its results are there: a token's experts by rising place, then the shared one.
// added: it, of the first element that this thread has.
template <bool ONE>
static __device__ __forceinline__ void add_up(const Experts& a, const Units& units, uint32_t added) {
    const RoutePlan& plan = routed_plan();
    constexpr int AT_ONCE = 8;  // places whose results are read together
    const int topk = a.first.topk, first = threadIdx.x, end = units.tiles * rows_of<ONE>(a.tokens) * 16;
    const auto turn_of = [](const Element<ONE>& element) { return position().numbers[element.token]; };
    Element<ONE> element(a, units, first);
    const auto told_at = [&] {
        return a.peers.place_of(a.peers.rank, element.token, element.column(a), turn_of(element));
    };
    int64_t told = told_at();
    __syncthreads();
#pragma unroll 1
    for (int i = first; i < end; i += THREADS, element = Element<ONE>(a, units, i), told = told_at()) {
        const int at = element.at, token = element.token;
        const bf16* result = work_at<bf16>(a.results) + element.tile * rows_of<ONE>(a.tokens) * topk * 16 + (i & 15);
        if (i != first) added = element.bits(a);
        float y = 0.0f;
#pragma unroll 1
        for (int k = 0; k < topk; k += AT_ONCE) {
            int place[AT_ONCE];
            float one[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) place[j] = k + j < topk ? plan.places[token * topk + k + j] : -1;
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) one[j] = to_float(result[max(place[j], 0) * 16]);
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) y += place[j] < 0 ? 0.0f : one[j];
        }
        y += __uint_as_float(added);
        if (a.peers.size > 0) a.peers.tell_at(told, y, turn_of(element));
        else if (a.out_f32) static_cast<float*>(a.out)[at] = y;
        else static_cast<bf16*>(a.out)[at] = from_float<bf16>(y);
    }
}

// Rows of x that none of the block's tiles is multiplied with leave their place to sums: those behind them move up.
template <bool ONE>
static __device__ __forceinline__ void close_up(const Experts& a, const Units& units, Pass& pass) {
    RoutePlan& plan = routed_plan();
    const int thread = threadIdx.x, lane = thread % 32, stride = moe::stride_of(a.first.blocks);
    const uint32_t last = plan.group[units.find(a, false, units.count - 1).x];
    const int first = plan.group[units.find(a, false, 0).x] >> 16 & 63, end = (last >> 16 & 63) + (last >> 22);
    uint32_t tokens = 0;
#pragma unroll 1
    for (int place = first + lane; place < end; place += 32) tokens |= 1u << plan.token[place];
    tokens = __reduce_or_sync(moe::ALL, tokens);
    uint8_t* const rows = work_at<uint8_t>(a.staged);
    float* const undo = work_at<float>(UNDO_AT);
    int row = 0;
#pragma unroll 1
    for (uint32_t left = tokens; left != 0; left &= left - 1, ++row) {  // a thread has the same columns of every row
        const int token = __ffs(left) - 1;
        for (int at = 16 * thread; token != row && at < stride; at += 16 * THREADS)
            *reinterpret_cast<uint4*>(rows + row * stride + at) = *reinterpret_cast<const uint4*>(rows + token * stride + at);
        if (thread < moe::MOST_SLICES) undo[row * moe::MOST_SLICES + thread] = undo[token * moe::MOST_SLICES + thread];
    }
    __syncthreads();
    if (thread >= first && thread < end) plan.token[thread] = __popc(tokens & ((1u << plan.token[thread]) - 1));
    __syncthreads();
    pass.parked -= (rows_of<ONE>(a.tokens) - row) * stride;
}

// The next pass is over tiles of gate and up whose sums have room, which those of all that are left mostly do.
static __device__ __forceinline__ void begin_up(const Experts& a, const Units& units, Pass& pass) {
    const int left = units.count - pass.to, fit = (a.end - pass.parked) >> (6 + moe::cuts_of(a.first.blocks));
    pass.to = units.count;
    if (__all_sync(moe::ALL, left * TOKENS <= fit)) return;
    const Sum end(routed_plan(), a.first.rows, pass.from + fit);
    if (end.there) pass.to = min(pass.to, end.group * a.first.rows + end.tile - units.begin);
}

// The next pass is over down, for groups whose rows have room; how many rows. By whole warps.
static __device__ __forceinline__ int begin_down(const Experts& a, const Units& units, int groups, Pass& pass) {
    const RoutePlan& plan = routed_plan();
    const int lane = threadIdx.x % 32, place = plan.group[pass.group] >> 16 & 63;
    const auto ends = [&](int group) {
        const uint32_t word = plan.group[group];
        return __ballot_sync(moe::ALL, group < groups && int((word >> 16 & 63) + (word >> 22)) <= place + a.room);
    };
    const int next = __popc(ends(lane)) + __popc(ends(lane + 32));
    const uint32_t last = plan.group[next - 1];
    pass = {true, next * units.tiles, place * units.tiles, place, next, a.parked[1]};
    return (last >> 16 & 63) + (last >> 22) - place;
}

// When the plan is known and nobody reads any more what ROUTE had in front of UNDO_AT: the warp's pieces are listed, and the
// first chunk is asked for. No more at first: whatever else the phase begins with would wait behind full rings.
static __device__ __forceinline__ Units begin_experts(int turn, Stream& stream) {
    const Experts& a = payload<Experts>(turn);
    const RoutePlan& plan = routed_plan();
    const int lane = threadIdx.x % 32;
    const int4 head = *reinterpret_cast<const int4*>(&plan);  // groups, pairs, each, more
    const uint32_t low = plan.group[lane], high = plan.group[lane + 32];
    stream.pass();  // what the list says of these weights
    const Units units(a, head.x, head.z, head.w);
    list_units(a, units, low, high, 0, PIECES);
    Feed feed = {stream, work<ExpertsWork>().list[threadIdx.x / 32], units.all};
    feed.begin();
    return units;
}

// Of one row that is done at the end of ROUTE.
static __device__ __forceinline__ void begin_one(int turn, Stream stream) {
    const Units units = begin_experts(turn, stream);
    stream.park();
    place_units(payload<Experts>(turn), units, 0, PIECES);
}

template <bool ONE>
static __device__ __forceinline__ void experts_phase(int turn, const Meetings& meetings, Stream& stream) {
    const Experts& a = payload<Experts>(turn);
    ExpertsWork& w = work<ExpertsWork>();
    const RoutePlan& plan = routed_plan();
    const int thread = threadIdx.x, warp = moe::uniform(thread / 32);
    moe::Staging<1> tokens(a.first.x, a.first.x_row, rows_of<ONE>(a.tokens), a.first.columns, a.first.blocks);
    if (!ONE) tokens.load(warp);  // on their way in front of the weights; one row is there since ROUTE
    const RowNumbers numbers(a.peers, rows_of<ONE>(a.tokens));
    const int4 head = *reinterpret_cast<const int4*>(&plan);  // groups, pairs, each, more
    const Units units = ONE ? Units(a, head.x, head.z, head.w) : begin_experts(turn, stream);
    Feed feed = {stream, w.list[warp], units.all, min(units.all, 1)};
    if (thread < head.x) {  // nobody waits for them until sums are collected
        const int expert = plan.group[thread] & 0xFFFF;
        copy_async8(w.alpha[thread], a.first.alpha + 2 * expert);
        copy_async4(w.alpha[thread] + 2, a.second.alpha + expert);
    }
    if (!ONE && warp == WARPS - 1) list_places(rows_of<ONE>(a.tokens), a.first.topk);
    int done = 0;
    uint32_t added = 0;
    if (!ONE) tokens.finish(warp, work_at<uint8_t>(a.staged), work_at<float>(UNDO_AT));
    numbers.put();
    if (!ONE) __syncthreads();
    Pass pass = {false, 0, w.begin, 0, 0, a.parked[0]};
    if (!ONE) feed.fill(stream.stages);  // of one row behind all else: the copy engine takes no more at once
    if (!ONE && __any_sync(moe::ALL, units.count * TOKENS > a.fit)) close_up<ONE>(a, units, pass);
    if (!ONE) place_units(a, units, 0, PIECES);
    begin_up(a, units, pass);
    if (ONE) feed.fill(stream.stages);
    if (warp == SPEAKER / 32) receive_weights(a.weights, told_by(phase_at(turn).number - 1));
#pragma unroll 1
    while (true) {
#pragma unroll 1
        while (true) {
            multiply(a, units, pass, done, feed);
            collect<ONE>(a, units, pass);
            if (pass.down || pass.to == units.count) break;
            __syncthreads();
            const int2 tile = units.find(a, false, pass.to);
            const uint32_t group = plan.group[tile.x];
            pass.from = static_cast<int>(group >> 16 & 63) * a.first.rows + tile.y * static_cast<int>(group >> 22);
            begin_up(a, units, pass);
        }
        const bool meets = !pass.down, more = pass.group < head.x;
        if (meets) meetings.come();
        else if (more) __syncthreads();  // nobody reads the rows any more
        const int places = more ? begin_down(a, units, head.x, pass) : 0;
        moe::Staging<1> rows(a.second.x + pass.place * a.second.x_row, a.second.x_row, places, a.second.columns, a.second.blocks);
        if (meets) {
            if (ONE && warp == 0) list_places(1, a.first.topk);  // while blocks wait; of more rows it is done before
            meetings.wait_for_all();
            if (thread < units.tiles * rows_of<ONE>(a.tokens) * 16) added = Element<ONE>(a, units, thread).bits(a);
        }
        if (!more) break;
        rows.load(warp);
        rows.finish(warp, work_at<uint8_t>(a.staged), work_at<float>(UNDO_AT));
        __syncthreads();
    }
    add_up<ONE>(a, units, added);
    stream.fill();
}

// shared and plan: what ROUTE leaves; out [T, D]; mid: scratch [T topk, F]. grid: the launch's. Refuses what does not fit
// into work_bytes. size > 0: the ranks, of mhc_seam, whom the result is told; the next phase is that seam.
static cudaError_t describe_experts(Phase* phase, const void* shared, const void* plan, const void* x,
                                    int64_t x_row, const void* w13_tiles, const float* w13_alpha, const void* w2_tiles, const float* w2_alpha,
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
    a.shared = shared, a.weights = static_cast<const uint64_t*>(plan) + moe::FEW_PAIRS;
    a.first = job_of(w13_tiles, w13_alpha, x, x_row, mid, F / 8, D);
    a.second = job_of(w2_tiles, w2_alpha, mid, F, nullptr, D / 16, F);
    a.out = out, a.out_f32 = out_f32, a.tokens = tokens, a.of_block = {D / 16 / grid, D / 16 % grid};
    for (int down = 0; down < 2; ++down) {
        const int blocks = down ? a.second.blocks : a.first.blocks, cuts = moe::cuts_of(blocks), width = blocks >> cuts;
        while (a.halvings[down] < cuts && blocks >> (a.halvings[down] + 1) >= moe::CHUNK_BLOCKS) ++a.halvings[down];
        const bool whole = blocks % (1 << cuts) == 0 && (width == 2 || width == 4 || width == 8);
        a.width[down] = whole ? width : 0;
    }
    a.fit = layout.fit, a.end = work_bytes, a.room = layout.room, a.staged = layout.staged, a.results = layout.results;
    for (int down = 0; down < 2; ++down) a.parked[down] = layout.parked[down];
    a.peers = mhc::peers_of(inboxes, turns, nullptr, 0, rank, size);
    if (const cudaError_t error = fill_phase(phase, EXPERTS, a)) return error;
    phase->joined = size > 0 ? NEXT : 0;
    return cudaSuccess;
}

}  // namespace dsv4::persistent
