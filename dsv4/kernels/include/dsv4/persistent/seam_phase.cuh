// mhc_seam of a few rows as a phase: what mhc.cuh says, with one or more slices of 64 columns of some of the tokens to a
// block. All shares are told before any is heard, so that fewer blocks than slices will do.
//
// Two parts of it are done while blocks wait for each other: before the phase parameters are asked for (seam_ahead), after
// it come post and comb (seam_rest), which no one needs before the next seam.
#pragma once
#include <cstddef>
#include <dsv4/bulk.cuh>
#include <dsv4/mhc.cuh>
#include <dsv4/persistent/memory.cuh>

namespace dsv4::persistent {

struct Seam {
    mhc::Args<bf16> args;
    mhc::Words<mhc::SEAM>* words;  // of all seams of a program; zeros at first
    int slices, together;          // tokens of a block
};

// What waits for a slice's sums.
struct SeamSlice {
    float weight[mhc::COLUMNS];
    float streams[TOKENS][mhc::M][mhc::COLUMNS];
};

struct SeamWork {
    using S = mhc::Shape<mhc::SEAM>;
    float parts[TOKENS][S::WARPS][S::SHARE + 1], totals[TOKENS][S::WORDS * exchange::PER_WORD], mixes[TOKENS][32];
    float heard[TOKENS][mhc::COLUMNS];  // from the peers
    uint32_t turns[TOKENS];
    alignas(16) float rows[S::SHARE][THREADS][mhc::W];  // fn of a slice, as threads use it
    SeamSlice slices[1];                                // of the block
};
static_assert(mhc::Shape<mhc::SEAM>::WARPS == WARPS && TOKENS <= mhc::FEW && 2 * TOKENS <= WARPS);

constexpr int seam_work_bytes(int D, int grid) {
    const int slices = (D + mhc::COLUMNS - 1) / mhc::COLUMNS;
    return static_cast<int>(offsetof(SeamWork, slices) + (slices + grid - 1) / grid * sizeof(SeamSlice));
}

// Slices slice, slice + gridDim.x, .. of tokens first .. first + count - 1 are this block's.
struct SeamShare {
    int slice = blockIdx.x, first = 0, count;
    bool ends;  // finishes the mixes of its tokens
    __device__ __forceinline__ explicit SeamShare(const Seam& seam) {
        const int tokens = static_cast<int>(seam.args.tokens);
        for (; slice >= seam.slices && first < tokens; first += seam.together) slice -= seam.slices;
        count = min(seam.together, tokens - first);
        ends = slice == min(seam.slices, static_cast<int>(gridDim.x)) - 1;
    }
};

// A thread's parameters of a slice; they come as one group of copies.
static __device__ __forceinline__ void fetch_parameters(const mhc::Args<bf16>& a, int slice, SeamSlice& to) {
    using S = SeamWork::S;
    const mhc::Place p(slice, a.D, true);
    SeamWork& s = work<SeamWork>();
    if (p.wide) {
        const float* row = a.fn + (static_cast<int64_t>(p.team * S::SHARE) * mhc::M + p.stream) * a.D + p.d;
#pragma unroll
        for (int i = 0; i < S::SHARE; ++i)
            start_copy16(shared_address(s.rows[i][threadIdx.x]), row + static_cast<int64_t>(i) * mhc::M * a.D);
        if (threadIdx.x < mhc::QUADS) start_copy16(shared_address(to.weight + p.column), a.weight + p.d);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Every thread calls, after come() behind the phase in front.
static __device__ __forceinline__ void seam_ahead(int turn) {
    const Seam& seam = payload<Seam>(turn);
    const SeamShare mine(seam);
    if (mine.count > 0) fetch_parameters(seam.args, mine.slice, work<SeamWork>().slices[0]);
}

static __device__ __forceinline__ void seam_phase(int turn) {
    using namespace mhc;
    using mhc::SEAM;
    using S = SeamWork::S;
    const Seam& seam = payload<Seam>(turn);
    const Args<bf16> a = seam.args;  // at once
    const Peers& peers = seam.args.peers;
    Words<SEAM>& words = *seam.words;
    SeamWork& s = work<SeamWork>();
    const SeamShare mine(seam);
    const int first = mine.first, count = mine.count, slices = seam.slices;
    if (count <= 0) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool alone = !peers.any();
    const int hears = alone ? TOKENS : WARPS - 1 - warp;  // token whose parts this warp tells and hears
    uint32_t among = 0, number = 0;
    if (hears < count) {
        Meeting meeting(peers, first + hears, mine.slice, a.D);
        among = peers.turn_of(first + hears);
#pragma unroll 1
        for (int slice = mine.slice;;) {
            meeting.tell(among);
            slice += gridDim.x;
            if (slice >= slices) break;
            meeting.take(slice, a.D);
        }
    }
    if (warp == TOKENS && lane < count) number = exchange::last_turn(&words.turns[first + lane]) + 1;
    const float scale = scale_of<SEAM>(a, lane), base = a.base[row_of<SEAM>(lane)];
    SeamSlice* now = s.slices;
#pragma unroll 1
    for (int slice = mine.slice; slice < slices; slice += gridDim.x, ++now) {
        const Place p(slice, a.D, true);
        Leaving<bf16> leaving;
        if (p.team < count) leaving.read(a, p, first + p.team, alone);
        if (!alone) {
            if (hears < count)
                *reinterpret_cast<float2*>(&s.heard[hears][lane * 2]) =
                    Meeting(peers, first + hears, slice, a.D).hear(among);
            __syncthreads();
        }
        if (p.team < count)
            leaving.finish(a, p, first + p.team, alone, s.heard[p.team], now->streams[p.team]);
        if (slice == mine.slice && warp == TOKENS && lane < count) s.turns[lane] = number;
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
        float f[S::SHARE][W];
#pragma unroll
        for (int i = 0; i < S::SHARE; ++i)
#pragma unroll
            for (int k = 0; k < W; ++k) f[i][k] = p.wide ? s.rows[i][threadIdx.x][k] : 0.0f;
#pragma unroll 2
        for (int t = 0; t < count; ++t) part_of_sums<SEAM>(f, p, now->streams[t], s.parts[t][warp]);
        if (slice + static_cast<int>(gridDim.x) < slices) fetch_parameters(a, slice + gridDim.x, now[1]);
        __syncthreads();
        if (warp < count && lane < S::WORDS) {
            float values[exchange::PER_WORD];
            shares_of_word<SEAM>(s.parts[warp], lane, values);
            exchange::tell(&words.sums[first + warp][lane][slice], values, s.turns[warp]);
        }
    }

    constexpr int AT_ONCE = 2;  // of a warp: two tokens' words in one go
#pragma unroll 1
    for (int begin = warp; begin < count * S::WORDS; begin += AT_ONCE * WARPS) {
        WordOfSlices all[AT_ONCE];
#pragma unroll
        for (int c = 0; c < AT_ONCE; ++c) {
            const int i = begin + c * WARPS;
            const bool any = i < count * S::WORDS;
            const int t = any ? i / S::WORDS : 0, word = i % S::WORDS;
            all[c] = {any, word, s.turns[t], words.sums[first + t][word], s.totals[t]};
        }
        hear_slices<2>(all, slices);
    }
    __syncthreads();
    // Every block of these tokens has read the numbers of the turn: this one has heard of all. By idle warps.
    if (mine.slice == 0) {
        if (warp == TOKENS && lane < count) words.turns[first + lane] = s.turns[lane];
        if (hears < count && lane == 0) peers.turns[first + hears] = among;
    }
    if (warp >= count) return;
    const float z = mix<SEAM>(a, s.totals[warp], scale, base);
    if (mine.ends) s.mixes[warp][lane] = z;
    now = s.slices;
#pragma unroll 1
    for (int slice = mine.slice; slice < slices; slice += gridDim.x, ++now) {
        const int d = slice * COLUMNS + lane * W, left = lane < QUADS ? a.D - d : 0;
        const float4 chunk = *reinterpret_cast<const float4*>(&now->weight[lane % QUADS * W]);
        const float weight[W] = {chunk.x, chunk.y, chunk.z, chunk.w};
        collapse<SEAM>(a, first + warp, z, s.totals[warp], now->streams[warp], weight, d, left, left > 0);
    }
}

// After come() behind the phase and before wait_for_all(), while no one writes to the work area but seam_ahead. By the upper
// half of the warps.
static __device__ __forceinline__ void seam_rest(int turn) {
    const Seam& seam = payload<Seam>(turn);
    const SeamShare mine(seam);
    const int t = static_cast<int>(threadIdx.x / 32) - TOKENS;
    if (mine.ends && t >= 0 && t < mine.count)
        mhc::finish_mixes(seam.args, mine.first + t, work<SeamWork>().mixes[t][threadIdx.x % 32]);
}

// mhc_seam's arguments; words: sizeof(Words<SEAM>) bytes, zeros at first; grid: the program's blocks.
static cudaError_t describe_seam(Phase* phase, const void* y, const void* h, const float* post, const float* comb,
                                 const float* fn, const float* base, const float* scale, const float* weight, void* h_out,
                                 void* x_out, float* post_out, float* comb_out, int64_t tokens, int D, int64_t y_stride,
                                 int iters, float hc_eps, float norm_eps, uint64_t* const* inboxes, uint32_t* turns,
                                 int rank, int size, void* words, int grid) {
    if (tokens < 1 || tokens > TOKENS || D < 1 || D > mhc::MOST_COLUMNS || size > mhc::MOST_RANKS || grid < 1)
        return cudaErrorInvalidValue;
    const int slices = (D + mhc::COLUMNS - 1) / mhc::COLUMNS, parts = grid > slices ? grid / slices : 1;
    *phase = {};
    phase->kind = SEAM;
    Seam& seam = *reinterpret_cast<Seam*>(phase->payload);
    seam.args = mhc::seam_args<bf16>(y, h, post, comb, fn, base, scale, weight, h_out, x_out, post_out, comb_out, tokens,
                                     D, y_stride, iters, hc_eps, norm_eps, inboxes, turns, rank, size);
    if (!seam.args.wide) return cudaErrorInvalidValue;
    seam.words = static_cast<mhc::Words<mhc::SEAM>*>(words), seam.slices = slices;
    seam.together = static_cast<int>((tokens + parts - 1) / parts);
    return cudaSuccess;
}

}  // namespace dsv4::persistent
