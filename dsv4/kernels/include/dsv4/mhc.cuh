// Entering an mHC site (PRE), leaving one on the way (SEAM), the head's collapse (HEAD), or leaving the last site on the
// way to that (FINAL).
//
// A block takes 64 columns, in all M streams, of TT tokens: its share of a token's ROWS products with fn and of the sum
// of squares; in a SEAM of the products of the streams with each other, which give the sum of squares of any mixture of
// them, so that the norm of the collapsed x needs no sum of its own. A token's shares are added up always in the same
// order, and then: mixes, collapse, norm; Sinkhorn beside them, in one warp. For a few tokens the blocks of a token tell
// each other their shares and each goes on with its own columns (exchange.cuh): here is what they do, in a launch
// (mhc_kernels.cuh; of more tokens mhc_together.cuh) or a phase of a program (persistent/seam_phase.cuh).
//
// Where a site is left on several ranks, y is this rank's part of a sum (Peers).
#pragma once
#include <dsv4/launch.cuh>
#include <dsv4/numbers.cuh>
#include <dsv4/peers.cuh>
#include <dsv4/reduce.cuh>
#include <dsv4/sinkhorn.cuh>

namespace dsv4::mhc {

enum Kind { PRE, SEAM, HEAD, FINAL };

constexpr int M = SITE;  // hc_mult of Flash and Pro
constexpr int W = 4;     // columns per thread while the sums are made
constexpr int PLACES = M * COLUMNS / W, QUADS = COLUMNS / W;
constexpr int HEARD = 2;  // tokens of a block whose parts its idle warps hear
constexpr int FEW = 8, MOST_SLICES = MOST_COLUMNS / COLUMNS;
constexpr int PAIRS = M * (M + 1) / 2;
constexpr unsigned ALL = 0xffffffffu;
static_assert(PLACES == 64 && QUADS == 16, "two warps hold a team's places, half a warp a slice's columns");

template <Kind KIND>
struct Shape {
    static constexpr bool LEAVES = KIND == SEAM || KIND == FINAL;  // its streams are made on the way in
    static constexpr bool ENTERS = KIND == PRE || KIND == SEAM;    // and has mixes to finish
    static constexpr int ROWS = ENTERS ? (2 + M) * M : M;           // pre | post | comb
    static constexpr int SUMS = ROWS + (KIND == SEAM ? PAIRS : 1);  // and products of streams, or sum of squares
    static constexpr int WORDS = (SUMS + exchange::PER_WORD - 1) / exchange::PER_WORD;
    static constexpr int TEAM = ENTERS ? 8 : 4;  // of 64 threads, each with
    static constexpr int SHARE = ROWS / TEAM;          // so many rows of fn
    static constexpr int WORKERS = TEAM * PLACES, WARPS = WORKERS / 32;
    static constexpr int THREADS = WORKERS + (ENTERS ? 32 : 0);  // of the second launch: and a warp for Sinkhorn
    static constexpr int SOME = KIND == FINAL ? 2 : 4;  // tokens of a block of two launches, or twice as many
    static_assert(SHARE * TEAM == ROWS && SHARE < 4 && ROWS <= 32 && WORDS <= WARPS);
    static_assert(KIND != SEAM || exchange::PER_WORD * (WORDS - TEAM) <= WARPS, "a pair of streams to a warp");
};

template <typename T>
struct Args {
    const T *y, *h;                                     // y, post, comb, h_out: where a site is left; weight: SEAM
    const float *post, *comb, *fn, *base, *scale, *weight;  // scale: of each row; one for all of the head
    T *h_out, *x_out;
    float *post_out, *comb_out;
    float4* shares;  // [T, WORDS, slices]: of the two launches
    Peers peers;
    int64_t tokens, y_stride;
    int D, iters;
    float hc_eps, norm_eps, mean;  // mean: 1 / D
    bool wide;
};

// What the blocks of one launch tell each other. One per op and device.
template <Kind KIND>
struct Words {
    exchange::Word sums[FEW][Shape<KIND>::WORDS][MOST_SLICES];
    uint32_t turns[FEW];
};

// A thread's columns while the sums are made: W of one stream.
struct Place {
    int team, stream, column, d, left;  // column: of the block's 64
    bool wide;
    __device__ Place(int slice, int D, bool all_wide) {
        const int place = threadIdx.x % PLACES;
        team = threadIdx.x / PLACES, stream = place / QUADS, column = place % QUADS * W;
        d = slice * COLUMNS + column, left = D - d;
        wide = all_wide && left > 0;
    }
};

// Four sums over a warp in six exchanges, or over each half of it in five; a quarter of the lanes gets that of sums[i].
template <int LANES = 32>
__device__ __forceinline__ float four_sums(const float (&sums)[4]) {
    const bool upper = threadIdx.x & LANES / 2, odd = threadIdx.x & LANES / 4;
    const float a = (upper ? sums[2] : sums[0]) + __shfl_xor_sync(ALL, upper ? sums[0] : sums[2], LANES / 2);
    const float b = (upper ? sums[3] : sums[1]) + __shfl_xor_sync(ALL, upper ? sums[1] : sums[3], LANES / 2);
    return lane_sum<LANES / 4>((odd ? b : a) + __shfl_xor_sync(ALL, odd ? a : b, LANES / 4));
}

// A thread's columns as they lie in memory: so that none is waited for before all are asked for.
template <typename T, int N>
struct Raw {
    union {
        typename Chunk<W * sizeof(T)>::type chunk;
        T element[W];
    } of[N];

    // from(i) + d: where those of number i lie.
    template <typename From>
    __device__ __forceinline__ void load(const Place& p, From from) {
        if (p.wide) {
#pragma unroll
            for (int i = 0; i < N; ++i)
                of[i].chunk = *reinterpret_cast<const decltype(of[i].chunk)*>(from(i) + p.d);
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i)
#pragma unroll
                for (int k = 0; k < W; ++k) of[i].element[k] = k < p.left ? from(i)[p.d + k] : from_float<T>(0.0f);
        }
    }
    __device__ float value(int i, int k) const { return to_float(of[i].element[k]); }
};

// A thread's rows of fn.
template <Kind KIND, typename T>
__device__ __forceinline__ void load_rows(const Args<T>& a, const Place& p, float (&f)[Shape<KIND>::SHARE][W]) {
    Raw<float, Shape<KIND>::SHARE> raw;
    const float* first = a.fn + (static_cast<int64_t>(p.team * Shape<KIND>::SHARE) * M + p.stream) * a.D;
    raw.load(p, [&](int i) { return first + static_cast<int64_t>(i) * M * a.D; });
#pragma unroll
    for (int i = 0; i < Shape<KIND>::SHARE; ++i)
#pragma unroll
        for (int k = 0; k < W; ++k) f[i][k] = raw.value(i, k);
}

// Between those who hear the peers and those who need the sums, so many threads.
__device__ __forceinline__ void peers_heard(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

// h' = post y + comb^T h, rounded, of a thread's columns of a token. alone: y has one part, else others hear it meanwhile.
template <typename T>
struct Leaving {
    float v[W], gain;
    Raw<T, M + 1> old;  // and y; where that is heard, any memory

    __device__ __forceinline__ void read(const Args<T>& a, const Place& p, int64_t token, bool alone) {
        float mixes[M];
        const T* h = a.h + token * M * a.D;
        const T* y = alone ? a.y + token * a.y_stride : h;
        old.load(p, [&](int j) { return j < M ? h + static_cast<int64_t>(j) * a.D : y; });
#pragma unroll
        for (int j = 0; j < M; ++j) mixes[j] = a.comb[(token * M + j) * M + p.stream];
        gain = a.post[token * M + p.stream];
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = 0.0f;
#pragma unroll
        for (int j = 0; j < M; ++j)
#pragma unroll
            for (int k = 0; k < W; ++k) v[k] = fmaf(old.value(j, k), mixes[j], v[k]);
    }
    // Into `streams` and written. `sums`: what was heard, in float32, to be rounded.
    __device__ __forceinline__ void finish(const Args<T>& a, const Place& p, int64_t token, bool alone, const float* sums,
                                           float (&streams)[M][COLUMNS]) {
        float from[W];
#pragma unroll
        for (int k = 0; k < W; ++k) from[k] = alone ? old.value(M, k) : rounded<T>(sums[p.column + k]);
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = rounded<T>(fmaf(from[k], gain, v[k]));
        *reinterpret_cast<float4*>(&streams[p.stream][p.column]) = make_float4(v[0], v[1], v[2], v[3]);
        if (p.left > 0) store<W>(a.h_out + (token * M + p.stream) * a.D + p.d, v, p.left, p.wide);
    }
};

// The site's streams of the block's columns and tokens `first`.. into `streams`; of each token by one team, so that all
// are loaded at once. More than HEARD have no peers.
template <Kind KIND, int TT, typename T>
__device__ __forceinline__ void load_streams(const Args<T>& a, const Place& p, int64_t first, int count,
                                             float (&streams)[TT][M][COLUMNS]) {
    using S = Shape<KIND>;
    if constexpr (S::LEAVES) {
        static_assert(TT <= S::TEAM);
        __shared__ __align__(8) float sums[TT][COLUMNS];
        if (p.team < count) {
            const bool alone = TT > HEARD || !a.peers.any();
            Leaving<T> leaving;
            leaving.read(a, p, first + p.team, alone);
            if (!alone) peers_heard(S::WORKERS);
            leaving.finish(a, p, first + p.team, alone, sums[p.team], streams[p.team]);
        } else if (TT <= HEARD && a.peers.any()) {
            const int t = S::WARPS - 1 - threadIdx.x / 32;
            if (t < count) {
                const Meeting meeting(a.peers, first + t, blockIdx.x, a.D);
                const uint32_t turn = a.peers.turn_of(first + t);
                meeting.tell(turn);
                *reinterpret_cast<float2*>(&sums[t][threadIdx.x % 32 * 2]) = meeting.hear<4>(turn);
            }
            peers_heard(S::WORKERS);
        }
    } else {
#pragma unroll
        for (int t = 0; t < TT; t += S::TEAM) {
            if (t + p.team >= count) break;
            float v[W];
            load<W>(a.h + ((first + t + p.team) * M + p.stream) * a.D + p.d, v, p.left, p.wide);
            *reinterpret_cast<float4*>(&streams[t + p.team][p.stream][p.column]) = make_float4(v[0], v[1], v[2], v[3]);
        }
    }
}

// A warp's part of a token's sums: of SHARE rows over its team's places there; then, over all of the block's columns, the
// product of two streams, another pair in each warp, or over its places the squares.
template <Kind KIND>
__device__ __forceinline__ void part_of_sums(const float (&f)[Shape<KIND>::SHARE][W], const Place& p,
                                             const float (&streams)[M][COLUMNS], float (&part)[Shape<KIND>::SHARE + 1]) {
    constexpr int SHARE = Shape<KIND>::SHARE;
    const float4 chunk = *reinterpret_cast<const float4*>(&streams[p.stream][p.column]);
    const float v[W] = {chunk.x, chunk.y, chunk.z, chunk.w};
    float sums[4] = {};
#pragma unroll
    for (int k = 0; k < W; ++k)
#pragma unroll
        for (int i = 0; i < SHARE; ++i) sums[i] = fmaf(f[i][k], v[k], sums[i]);
    if constexpr (KIND == SEAM) {  // (0,0) (1,1) (2,2) (3,3) (0,1) (0,2) (0,3) (1,2) (1,3) (2,3)
        const int pair = threadIdx.x / 32 * 4, column = threadIdx.x % 32 * 2;
        const float2 one = *reinterpret_cast<const float2*>(&streams[0x2110003210ull >> pair & 3][column]);
        const float2 other = *reinterpret_cast<const float2*>(&streams[0x3323213210ull >> pair & 3][column]);
        sums[SHARE] = fmaf(one.x, other.x, __fmul_rn(one.y, other.y));
    } else {
#pragma unroll
        for (int k = 0; k < W; ++k) sums[SHARE] = fmaf(v[k], v[k], sums[SHARE]);
    }
    const float sum = four_sums(sums);
    const int which = threadIdx.x % 32 / 8;
    if (threadIdx.x % 8 == 0 && which <= SHARE) part[which] = sum;
}

// The block's shares of word `word`'s sums, from the parts of its warps.
template <Kind KIND>
__device__ __forceinline__ void shares_of_word(const float (&parts)[Shape<KIND>::WARPS][Shape<KIND>::SHARE + 1], int word,
                                               float (&values)[exchange::PER_WORD]) {
    using S = Shape<KIND>;
    constexpr int PART = S::SHARE + 1;
    const bool rows = word < S::TEAM;
#pragma unroll
    for (int i = 0; i < exchange::PER_WORD; ++i) {
        const float* at = &parts[0][0];
        if constexpr (S::SHARE == exchange::PER_WORD) {  // a team's rows; then what the warps have beside them
            const int warp = KIND == SEAM ? (word - S::TEAM) * exchange::PER_WORD + i : 0;
            at += rows ? 2 * word * PART + i : warp * PART + S::SHARE;
        } else {
            const int sum = word * exchange::PER_WORD + i;
            at += sum < S::ROWS ? 2 * sum * PART : S::SHARE;
        }
        values[i] = KIND != SEAM || rows ? at[0] + at[PART] : at[0];
    }
}

// By warp `word`: the sums of a word over all slices, of which a lane has added up those of its number.
__device__ __forceinline__ void total_of_word(const float (&sums)[4], int word, float* totals) {
    const float total = four_sums(sums);
    const int lane = threadIdx.x % 32;
    if (lane % 8 == 0 && lane / 8 < exchange::PER_WORD) totals[word * exchange::PER_WORD + lane / 8] = total;
}

// One of a token's words that a warp hears of all slices, if there is any, and where the sums belong.
struct WordOfSlices {
    bool any;
    int word;
    uint32_t turn;
    const exchange::Word* from;
    float* totals;
};

// By a warp, of 32 N slices at once.
template <int N, int COUNT>
__device__ __forceinline__ void hear_slices(const WordOfSlices (&all)[COUNT], int slices) {
    const int lane = threadIdx.x % 32;
    float sums[COUNT][4] = {};
#pragma unroll 1
    for (int begin = lane; begin - lane < (32 * N < MOST_SLICES ? slices : 1); begin += 32 * N) {
        exchange::Word heard[COUNT][N] = {};
#pragma unroll
        for (int c = 0; c < COUNT; ++c)
#pragma unroll
            for (int i = 0; i < N; ++i)
                if (all[c].any && begin + 32 * i < slices) heard[c][i] = look(all[c].from + begin + 32 * i);
#pragma unroll
        for (int c = 0; c < COUNT; ++c)
#pragma unroll
            for (int i = 0; i < N; ++i)
                if (all[c].any && begin + 32 * i < slices) {
                    while (heard[c][i].turn != all[c].turn) heard[c][i] = look(all[c].from + begin + 32 * i);
#pragma unroll
                    for (int k = 0; k < exchange::PER_WORD; ++k) sums[c][k] += heard[c][i].values[k];
                }
    }
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
        if (all[c].any) total_of_word(sums[c], all[c].word, all[c].totals);
}

// The sum of squares of all streams.
template <Kind KIND>
__device__ __forceinline__ float squares_of(const float* totals) {
    const float* at = totals + Shape<KIND>::ROWS;
    return KIND == SEAM ? (at[0] + at[1]) + (at[2] + at[3]) : at[0];
}

// The number of `lane`'s row in scale and base.
template <Kind KIND>
__device__ __forceinline__ int row_of(int lane) {
    return min(lane, Shape<KIND>::ROWS - 1);
}
template <Kind KIND, typename T>
__device__ __forceinline__ float scale_of(const Args<T>& a, int lane) {
    return a.scale[Shape<KIND>::ENTERS ? row_of<KIND>(lane) : 0];
}

// In lane i mix i: (fn . v) * rsqrt(mean(v^2) + eps) * scale + base.
template <Kind KIND, typename T>
__device__ __forceinline__ float mix(const Args<T>& a, const float* totals, float scale, float base) {
    const float root = rsqrtf(squares_of<KIND>(totals) * (a.mean / M) + a.norm_eps);
    return fmaf(__fmul_rn(totals[row_of<KIND>(threadIdx.x % 32)], root), scale, base);
}

// What the normed x is multiplied by: from the sum of squares of sum_j pre_j v_j, a quadratic form of pre.
template <typename T>
__device__ __forceinline__ float norm_factor(const Args<T>& a, const float* totals, const float (&pre)[M]) {
    const float* at = totals + Shape<SEAM>::ROWS;
    float square = 0.0f;
    int pair = M;
#pragma unroll
    for (int i = 0; i < M; ++i) {
        float others = 0.0f;
#pragma unroll
        for (int j = i + 1; j < M; ++j) others = fmaf(pre[j], at[pair++], others);
        square = fmaf(pre[i], fmaf(2.0f, others, __fmul_rn(pre[i], at[i])), square);
    }
    if (square < 0.0f) square = 0.0f;  // streams that cancel out, but for roundings
    return rsqrtf(square * a.mean + a.norm_eps);
}

// values[i], i from 0 to 3, without an address.
__device__ __forceinline__ float one_of(const float (&values)[M], int i) {
    const float low = i & 1 ? values[1] : values[0], high = i & 1 ? values[3] : values[2];
    return i & 2 ? high : low;
}

// post and comb of a token, by one warp whose lane i holds mix i. Lanes 2M .. hold an entry of comb each, and those of a
// row of it lie side by side; every lane does all of Sinkhorn.
template <typename T>
__device__ __forceinline__ void finish_mixes(const Args<T>& a, int64_t token, float z) {
    const int lane = threadIdx.x % 32, entry = lane - 2 * M;
    if (lane >= M && lane < 2 * M) a.post_out[token * M + lane - M] = 2.0f * sigmoid(z);
    float top = fmaxf(z, __shfl_xor_sync(ALL, z, 1));
    top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
    const float power = expf(z - top);
    float sum = power + __shfl_xor_sync(ALL, power, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
    const float own = __fadd_rn(__fdiv_rn(power, sum), a.hc_eps);
    float c[M][M], rows[M], columns[M];
#pragma unroll
    for (int i = 0; i < M * M; ++i) c[i / M][i % M] = __shfl_sync(ALL, own, 2 * M + i);
    sinkhorn(c, rows, columns, a.iters, a.hc_eps);
    const float row = one_of(rows, entry / M), column = one_of(columns, entry % M);
    if (entry >= 0 && entry < M * M) a.comb_out[token * M * M + entry] = __fmul_rn(__fmul_rn(own, row), column);
}

// x from a block's streams, by a warp whose lane i holds mix i; a lane's columns begin at d, if `left` is not 0.
template <Kind KIND, typename T>
__device__ __forceinline__ void collapse(const Args<T>& a, int64_t token, float z, const float* totals,
                                         const float (&streams)[M][COLUMNS], const float (&weight)[W], int d, int left,
                                         bool wide) {
    const float gain = sigmoid(z) + a.hc_eps;
    float pre[M], x[W];
#pragma unroll
    for (int j = 0; j < M; ++j) pre[j] = __shfl_sync(ALL, gain, j);
#pragma unroll
    for (int k = 0; k < W; ++k) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < M; ++j) sum = fmaf(pre[j], streams[j][threadIdx.x % QUADS * W + k], sum);
        x[k] = rounded<T>(sum);
    }
    if constexpr (KIND == SEAM) {
        const float factor = norm_factor(a, totals, pre);
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] = x[k] * factor * weight[k];
    }
    if (left > 0) store<W>(a.x_out + token * a.D + d, x, left, wide);
}

// What a SEAM is called with, and but for weight, post_out and comb_out a FINAL. size > 1: y is this rank's part in float32, inboxes the addresses of all ranks'.
template <typename T>
static Args<T> seam_args(const void* y, const void* h, const float* post, const float* comb, const float* fn,
                         const float* base, const float* scale, const float* weight, void* h_out, void* x_out,
                         float* post_out, float* comb_out, int64_t tokens, int D, int64_t y_stride, int iters,
                         float hc_eps, float norm_eps, uint64_t* const* inboxes, uint32_t* turns, int rank, int size) {
    constexpr int N = wide_elements<T>;
    const bool y_wide = size > 1 || (y_stride % N == 0 && aligned16(y));
    Args<T> args = {};
    args.h = static_cast<const T*>(h), args.post = post, args.comb = comb, args.fn = fn, args.base = base;
    args.scale = scale, args.weight = weight, args.h_out = static_cast<T*>(h_out), args.x_out = static_cast<T*>(x_out);
    args.post_out = post_out, args.comb_out = comb_out, args.tokens = tokens, args.y_stride = y_stride, args.D = D;
    args.iters = iters, args.hc_eps = hc_eps, args.norm_eps = norm_eps, args.mean = 1.0f / static_cast<float>(D);
    args.wide = y_wide && D % N == 0 && aligned16(h) && aligned16(fn) && aligned16(weight) && aligned16(h_out) &&
                aligned16(x_out);
    args.peers.size = size;
    if (size > 1 && size <= MOST_RANKS)
        args.peers = peers_of(inboxes, turns, static_cast<const float*>(y), y_stride, rank, size);
    else
        args.y = static_cast<const T*>(y);
    return args;
}

}  // namespace dsv4::mhc
