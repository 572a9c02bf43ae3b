// mhc_seam of a few rows as a phase: what mhc.cuh says, with one or more slices of 64 columns of some of the tokens to a
// block. All shares are told before any is heard, so that fewer blocks than slices will do.
//
// Sinkhorn is apart (seam_rest): its results are needed by the next seam alone.
#pragma once
#include <cstddef>
#include <dsv4/mhc.cuh>
#include <dsv4/persistent/memory.cuh>

namespace dsv4::persistent {

struct Seam {
    mhc::Args<bf16> args;
    mhc::Words<mhc::SEAM>* words;  // of all seams of a program; zeros at first
    int slices, together;          // tokens of a block
};

// A slice's normed streams wait here for the sums.
struct SeamSlice {
    float weight[mhc::COLUMNS];
    float streams[TOKENS][mhc::M][mhc::COLUMNS];
};

struct SeamWork {
    using S = mhc::Shape<mhc::SEAM>;
    float parts[TOKENS][S::WARPS][S::SHARE + 1], totals[TOKENS][S::WORDS * exchange::PER_WORD], mixes[TOKENS][32];
    float heard[TOKENS][mhc::COLUMNS];  // from the peers
    uint32_t turns[TOKENS];
    alignas(16) SeamSlice slices[1];  // of the block
};
static_assert(mhc::Shape<mhc::SEAM>::WARPS == WARPS && TOKENS <= mhc::FEW && 2 * TOKENS <= WARPS);

static_assert(offsetof(SeamWork, slices) == 6304 && sizeof(SeamSlice) == 8448, "the work area of a seam: program.py");

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

static __device__ __noinline__ void seam_phase(int turn) {
    using namespace mhc;
    using mhc::SEAM;
    using S = Shape<SEAM>;
    const Seam& seam = payload<Seam>(turn);
    const Args<bf16>& a = seam.args;
    SeamWork& s = work<SeamWork>();
    const SeamShare mine(seam);
    const int first = mine.first, count = mine.count, slices = seam.slices;
    if (count <= 0) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool alone = !a.peers.any();
    const int hears = alone ? TOKENS : WARPS - 1 - warp;  // token whose parts this warp tells and hears
    uint32_t among = 0;
    if (hears < count) {
        among = a.peers.turn_of(first + hears);
#pragma unroll 1
        for (int slice = mine.slice; slice < slices; slice += gridDim.x)
            Meeting(a.peers, first + hears, among, slice, a.D).tell();
    }
    const float scale = scale_of<SEAM>(a, lane), base = a.base[row_of<SEAM>(lane)];
    SeamSlice* now = s.slices;
#pragma unroll 1
    for (int slice = mine.slice; slice < slices; slice += gridDim.x, ++now) {
        const Place p(slice, a.D, a.wide);
        float f[S::SHARE][W];
        load_rows<SEAM>(a, p, f);
        if (p.team == 2) {  // few tokens leave it idle
            const int column = threadIdx.x % COLUMNS, d = slice * COLUMNS + column;
            now->weight[column] = d < a.D ? a.weight[d] : 0.0f;
        } else if (p.team == 4 && threadIdx.x % PLACES < count) {
            const int t = threadIdx.x % PLACES;
            s.turns[t] = exchange::last_turn(&seam.words->turns[first + t]) + 1;
        }
        Leaving<bf16> leaving;
        if (p.team < count) leaving.read(a, p, first + p.team, alone);
        if (!alone) {
            if (hears < count)
                *reinterpret_cast<float2*>(&s.heard[hears][lane * 2]) =
                    Meeting(a.peers, first + hears, among, slice, a.D).hear();
            __syncthreads();
        }
        if (p.team < count)
            leaving.finish(a, p, first + p.team, alone, s.heard[p.team], now->streams[p.team]);
        __syncthreads();
#pragma unroll 2
        for (int t = 0; t < count; ++t) part_of_sums<SEAM>(f, p, now->streams[t], s.parts[t][warp]);
        __syncthreads();
        if (warp < count && lane < S::WORDS) {
            float values[exchange::PER_WORD];
            shares_of_word<SEAM>(s.parts[warp], lane, values);
            exchange::tell(&seam.words->sums[first + warp][lane][slice], values, s.turns[warp]);
        }
    }

    constexpr int AT_ONCE = 3;  // four tokens' words in one go of all warps
#pragma unroll 1
    for (int begin = warp; begin < count * S::WORDS; begin += AT_ONCE * WARPS) {
        WordOfSlices all[AT_ONCE];
#pragma unroll
        for (int c = 0; c < AT_ONCE; ++c) {
            const int i = begin + c * WARPS;
            const bool any = i < count * S::WORDS;
            const int t = any ? i / S::WORDS : 0, word = i % S::WORDS;
            all[c] = {any, word, s.turns[t], seam.words->sums[first + t][word], s.totals[t]};
        }
        hear_slices(all, slices);
    }
    __syncthreads();
    // Every block of these tokens has read the numbers of the turn: this one has heard of all. By idle warps.
    if (mine.slice == 0) {
        if (warp == TOKENS && lane < count) seam.words->turns[first + lane] = s.turns[lane];
        if (hears < count && lane == 0) a.peers.turns[first + hears] = among;
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
        collapse<SEAM>(a, first + warp, z, s.totals[warp], now->streams[warp], weight, d, left, a.wide && left > 0);
    }
}

// post and comb, which no one needs before the next seam: between seam_phase, with a barrier behind it, and the next
// phase's first write to the work area. Every warp but the first half may be elsewhere.
static __device__ __noinline__ void seam_rest(int turn) {
    const Seam& seam = payload<Seam>(turn);
    const SeamShare mine(seam);
    const int t = static_cast<int>(threadIdx.x / 32) - TOKENS;
    if (mine.ends && t >= 0 && t < mine.count)
        mhc::finish_mixes(seam.args, mine.first + t, work<SeamWork>().mixes[t][threadIdx.x % 32]);
}

// Brings the parameters that a block will read to the L2 cache. By threads of other warps than the first.
static __device__ __forceinline__ void seam_ahead(const Seam& seam) {
    using namespace mhc;
    using mhc::SEAM;
    constexpr int LINE = 32, PER_ROW = COLUMNS / LINE, ROWS = Shape<SEAM>::ROWS * M;
    const Args<bf16>& a = seam.args;
    const SeamShare mine(seam);
    const int i = static_cast<int>(threadIdx.x) - 32, row = i / PER_ROW;
    if (mine.count <= 0 || i < 0 || row > ROWS + 1) return;
#pragma unroll 1
    for (int slice = mine.slice; slice < seam.slices; slice += gridDim.x) {
        const int d = slice * COLUMNS + i % PER_ROW * LINE;
        const float* line = row < ROWS ? a.fn + static_cast<int64_t>(row) * a.D + d : a.weight + d;
        if (row > ROWS) line = i % PER_ROW == 0 ? a.base : a.scale;
        if (d < a.D) asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    }
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
    seam.words = static_cast<mhc::Words<mhc::SEAM>*>(words), seam.slices = slices;
    seam.together = static_cast<int>((tokens + parts - 1) / parts);
    return cudaSuccess;
}

}  // namespace dsv4::persistent
