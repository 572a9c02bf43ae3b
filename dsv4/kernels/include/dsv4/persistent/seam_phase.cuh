// mhc_seam of a few rows as a phase: what mhc.cuh says, with a slice of 64 columns of some of the tokens to a block.
//
// The phase in front tells its result column by column, so blocks do not meet before this one. Its parameters are asked for
// at the end of that phase (seam_ahead); post and comb, which no one needs before the next seam, are made while blocks
// wait for each other behind it (seam_rest), by a block that has nothing else to do if there is one.
#pragma once
#include <dsv4/bulk.cuh>
#include <dsv4/mhc.cuh>
#include <dsv4/persistent/memory.cuh>

namespace dsv4::persistent {

struct Seam {
    mhc::Args<bf16> args;
    mhc::Words<mhc::SEAM>* words;  // of all seams of a program; zeros at first
    int slices, together;          // tokens of a block
    int closers;                   // the first of those blocks without a slice that finish the mixes of a token each; or -1
};

struct SeamWork {
    using S = mhc::Shape<mhc::SEAM>;
    float parts[TOKENS][S::WARPS][S::SHARE + 1], totals[TOKENS][S::WORDS * exchange::PER_WORD], mixes[TOKENS][32];
    float heard[TOKENS][mhc::COLUMNS];                  // from the ranks
    alignas(16) float rows[S::SHARE][THREADS][mhc::W];  // fn, as threads use it
    float weight[mhc::COLUMNS];
    float streams[TOKENS][mhc::M][mhc::COLUMNS];
};
static_assert(mhc::Shape<mhc::SEAM>::WARPS == WARPS && TOKENS <= mhc::FEW && 2 * TOKENS <= WARPS);

constexpr int seam_work_bytes(int, int) { return sizeof(SeamWork); }

// Slice `slice` of tokens first .. first + count - 1 is this block's; or it finishes the mixes of a token, and no more.
struct SeamShare {
    int slice = blockIdx.x, first = 0, count;
    bool ends, closes = false;  // ends: finishes the mixes of its tokens
    __device__ __forceinline__ SeamShare(const Seam& seam, int tokens) {
        for (; slice >= seam.slices && first < tokens; first += seam.together) slice -= seam.slices;
        count = min(seam.together, tokens - first);
        ends = seam.closers < 0 && slice == seam.slices - 1;
        const int token = static_cast<int>(blockIdx.x) - seam.closers;
        if (seam.closers >= 0 && token >= 0 && token < tokens) ends = closes = true, first = token, count = 1;
    }
};

// Every thread calls, at the end of the phase in front.
template <bool ONE>
static __device__ __forceinline__ void seam_ahead(int turn) {
    using namespace mhc;
    using S = SeamWork::S;
    const Seam& seam = payload<Seam>(turn);
    const SeamShare mine(seam, rows_of<ONE>(seam.args.tokens));
    if (threadIdx.x < TOKENS) ++position().seams[threadIdx.x];
    if (mine.count <= 0 || mine.closes) return;
    SeamWork& s = work<SeamWork>();
    const Args<bf16>& a = seam.args;
    const Place p(mine.slice, a.D, true);
    const float* row = a.fn + (p.team * S::SHARE * M + p.stream) * a.D + p.d;
    const uint32_t to = shared_address(s.rows[0][threadIdx.x]);
#pragma unroll
    for (int i = 0; i < S::SHARE; ++i) start_copy16(to + i * sizeof(s.rows[0]), row + i * M * a.D);
    if (threadIdx.x < QUADS) start_copy16(shared_address(s.weight + p.column), a.weight + p.d);
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// By a warp: a word's sums over all slices, of which a lane adds up those of its number.
static __device__ __forceinline__ void hear_word(const exchange::Word* from, int word, uint32_t turn, int slices,
                                                 float* totals) {
    const int lane = threadIdx.x % 32;
    float sums[4] = {};
#pragma unroll 1
    for (int begin = lane; begin - lane < slices; begin += 64) {
        const exchange::Word* first = from + min(begin, slices - 1);
        const exchange::Word* second = from + min(begin + 32, slices - 1);
        exchange::Word one, other;
        do {
            one = look(first), other = look(second);
        } while (__any_sync(mhc::ALL, one.turn != turn || other.turn != turn));
#pragma unroll
        for (int k = 0; k < exchange::PER_WORD; ++k) {
            sums[k] += begin < slices ? one.values[k] : 0.0f;
            sums[k] += begin + 32 < slices ? other.values[k] : 0.0f;
        }
    }
    mhc::total_of_word(sums, word, totals);
}

// The sums of the block's tokens over all slices.
static __device__ __forceinline__ void hear_totals(const Seam& seam, const SeamShare& mine) {
    using S = SeamWork::S;
    SeamWork& s = work<SeamWork>();
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < mine.count * S::WORDS; i += WARPS) {
        const int t = i / S::WORDS, word = i % S::WORDS, token = mine.first + t;
        hear_word(seam.words->sums[token][word], word, position().seams[token], seam.slices, s.totals[t]);
    }
    __syncthreads();
}

// What the block's columns have in the sums of its tokens, told to all that have columns of these. The phase in front has
// told all ranks its parts of y, row by row, and blocks have not met behind it.
static __device__ __forceinline__ void tell_sums(const Seam& seam, const SeamShare& mine) {
    using namespace mhc;
    using mhc::SEAM;
    using S = SeamWork::S;
    const Args<bf16>& a = seam.args;
    SeamWork& s = work<SeamWork>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = mine.count;
    Place p(mine.slice, a.D, true);
    p.wide = true, p.left = W;
    const bool hears = WARPS - 1 - warp < count;  // a token's parts
    if (hears) {
        const int t = WARPS - 1 - warp;
        const Meeting meeting(a.peers, mine.first + t, mine.slice, a.D, true);
        *reinterpret_cast<float2*>(&s.heard[t][lane * 2]) = meeting.hear<2>(position().numbers[mine.first + t]);
    }
    const bool makes = p.team < count;  // a token's streams
    if (makes) {
        Leaving<bf16> leaving;
        leaving.read(a, p, mine.first + p.team, false);
        __syncthreads();  // of the warps that tell or hear it would do, but racecheck then takes later ones for none
        leaving.finish(a, p, mine.first + p.team, false, s.heard[p.team], s.streams[p.team]);
    } else {
        __syncthreads();
    }

    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    float f[S::SHARE][W];
#pragma unroll
    for (int i = 0; i < S::SHARE; ++i) {
        const float4 chunk = *reinterpret_cast<const float4*>(s.rows[i][threadIdx.x]);
        f[i][0] = chunk.x, f[i][1] = chunk.y, f[i][2] = chunk.z, f[i][3] = chunk.w;
    }
#pragma unroll 1
    for (int t = 0; t < count; ++t) part_of_sums<SEAM>(f, p, s.streams[t], s.parts[t][warp]);
    __syncthreads();
    if (warp < count && lane < S::WORDS) {
        float values[exchange::PER_WORD];
        shares_of_word<SEAM>(s.parts[warp], lane, values);
        exchange::tell(&seam.words->sums[mine.first + warp][lane][mine.slice], values, position().seams[mine.first + warp]);
    }
}

template <bool ONE>
static __device__ __forceinline__ void seam_phase(int turn) {
    using namespace mhc;
    using mhc::SEAM;
    const Seam& seam = payload<Seam>(turn);
    const SeamShare mine(seam, rows_of<ONE>(seam.args.tokens));
    if (mine.count <= 0) return;
    const Args<bf16>& a = seam.args;
    SeamWork& s = work<SeamWork>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = mine.count;
    const float scale = scale_of<SEAM>(a, lane), base = a.base[row_of<SEAM>(lane)];
    if (mine.closes) __syncthreads();  // the number of the turn is there
    else tell_sums(seam, mine);
    hear_totals(seam, mine);
    // Every block has told its shares of these tokens. By an idle warp.
    if (mine.slice == 0 && !mine.closes && warp == TOKENS && lane < count) {
        seam.words->turns[mine.first + lane] = position().seams[mine.first + lane];
        a.peers.turns[mine.first + lane] = position().numbers[mine.first + lane];
    }
    if (warp >= count) return;
    const float z = mix<SEAM>(a, s.totals[warp], scale, base);
    if (mine.ends) s.mixes[warp][lane] = z;
    if (mine.closes) return;
    const auto& weight = *reinterpret_cast<const float(*)[W]>(s.weight + lane % QUADS * W);
    const int d = mine.slice * COLUMNS + lane * W;
    collapse<SEAM>(a, mine.first + warp, z, s.totals[warp], s.streams[warp], weight, d, lane < QUADS ? W : 0, true);
}

// After come() behind the phase and before wait_for_all(), while no one writes to the work area but seam_ahead. By the upper
// half of the warps.
template <bool ONE>
static __device__ __forceinline__ void seam_rest(int turn) {
    const Seam& seam = payload<Seam>(turn);
    const SeamShare mine(seam, rows_of<ONE>(seam.args.tokens));
    const int t = static_cast<int>(threadIdx.x / 32) - TOKENS;
    if (mine.ends && t >= 0 && t < mine.count)
        mhc::finish_mixes(seam.args, mine.first + t, work<SeamWork>().mixes[t][threadIdx.x % 32]);
}

// mhc_seam's arguments, D a multiple of 64, ranks also where there is one; words: sizeof(Words<SEAM>) bytes, zeros at first;
// grid: the program's blocks, at least one for each slice.
static cudaError_t describe_seam(Phase* phase, const void* y, const void* h, const float* post, const float* comb,
                                 const float* fn, const float* base, const float* scale, const float* weight, void* h_out,
                                 void* x_out, float* post_out, float* comb_out, int64_t tokens, int D, int64_t y_stride,
                                 int iters, float hc_eps, float norm_eps, uint64_t* const* inboxes, uint32_t* turns,
                                 int rank, int size, void* words, int grid) {
    const int slices = D / mhc::COLUMNS;
    if (tokens < 1 || tokens > TOKENS || D < 1 || D > mhc::MOST_COLUMNS || D % mhc::COLUMNS || slices > grid ||
        size < 1 || size > mhc::MOST_RANKS || inboxes == nullptr)
        return cudaErrorInvalidValue;
    const int parts = grid / slices;
    *phase = {};
    phase->kind = SEAM;
    Seam& seam = *reinterpret_cast<Seam*>(phase->payload);
    seam.args = mhc::seam_args<bf16>(y, h, post, comb, fn, base, scale, weight, h_out, x_out, post_out, comb_out, tokens,
                                     D, y_stride, iters, hc_eps, norm_eps, inboxes, turns, rank, size);
    if (!seam.args.wide) return cudaErrorInvalidValue;
    seam.args.peers = mhc::peers_of(inboxes, turns, nullptr, 0, rank, size);
    seam.words = static_cast<mhc::Words<mhc::SEAM>*>(words), seam.slices = slices;
    seam.together = static_cast<int>((tokens + parts - 1) / parts);
    seam.closers = parts * slices + tokens <= grid ? parts * slices : -1;
    return cudaSuccess;
}

}  // namespace dsv4::persistent
