// Leaving and entering (mhc.cuh) with up to 128 tokens in one launch, whose blocks all run at once: each has 64 columns of
// some tokens and keeps their streams. A token's shares of the sums are told to one of its blocks alone, the first token's
// to that of the first slice, which adds them up and tells all what they need for x: the gains, and the norm's factor. It
// does Sinkhorn beside that.
//
// A thread has four columns of all streams of a token while that is left and collapsed, so that all tokens of a block are
// asked for at once; for the sums it has those of two streams. Beside the warps that make these, some make the products
// of streams. What is added to what is as in mhc.cuh, so a row's bits are the same. Code that runs once a launch is not in
// a processor's caches: so what is usual, BF16 in whole slices and aligned rows, has kernels of its own (WIDE), which are
// short.
#pragma once
#include <dsv4/bulk.cuh>
#include <dsv4/dependent.cuh>
#include <dsv4/mhc.cuh>

namespace dsv4::mhc {

template <Kind KIND>
struct Together {
    using S = Shape<KIND>;
    static constexpr int SHARE = 4, TEAMS = S::ROWS / SHARE;  // rows of fn to a warp
    static constexpr int HALVED = S::ROWS + (KIND != SEAM);   // sums of two halves, each of two streams; and the squares
    static constexpr int WORKERS = 512, WARPS = WORKERS / 32;
    static constexpr int MAKERS = WARPS / TEAMS * TEAMS;             // warps of sums; the others: products of streams
    static constexpr int THREADS = WORKERS + (S::ENTERS ? 64 : 32);  // and a warp for gains, one for mixes
    static constexpr int TOKENS = WORKERS / QUADS;                   // left at once
    static constexpr int PARTS = KIND == SEAM ? 80 : 16;             // tokens go by two, each on other banks
    static constexpr int GAINS = 2;                                  // words
    static constexpr int BOUND = 1024;  // of threads, to the compiler: 64 registers, which the sums in front leave
    static_assert(S::LEAVES && S::WORDS <= WARPS && TEAMS * SHARE == S::ROWS);
    static_assert(exchange::PER_WORD * S::WORDS + HALVED <= PARTS);
    static_assert(KIND != SEAM || HALVED % exchange::PER_WORD == 0, "a word has halves or none");
};

// What the blocks of one launch tell each other. One per op and device.
template <Kind KIND>
struct WordsOfMany {
    exchange::Word sums[MANY_ROWS][Shape<KIND>::WORDS][MOST_SLICES], gains[MANY_ROWS][Together<KIND>::GAINS];
    uint32_t turns[MANY_ROWS];
};

// A block's memory: its columns of fn, and behind them its tokens.
template <Kind KIND>
using RowsOfFn = float[Shape<KIND>::ROWS][M][COLUMNS];
template <Kind KIND, typename T>
struct Row {
    T streams[M][COLUMNS];
    float parts[Together<KIND>::PARTS];  // rows of fn in halves; then pairs of streams
};

// Of so many tokens, rounded up to two.
template <Kind KIND, typename T>
constexpr size_t bytes_together(int tokens) {
    return sizeof(RowsOfFn<KIND>) + (tokens + 1) / 2 * 2 * sizeof(Row<KIND, T>);
}

// Columns that lie side by side, two to a register if they are BF16.
__device__ __forceinline__ void unpack(uint2 chunk, float (&v)[W]) {
    v[0] = low_half(chunk.x), v[1] = high_half(chunk.x), v[2] = low_half(chunk.y), v[3] = high_half(chunk.y);
}
__device__ __forceinline__ void unpack(uint4 chunk, float (&v)[W]) {
    v[0] = __uint_as_float(chunk.x), v[1] = __uint_as_float(chunk.y);
    v[2] = __uint_as_float(chunk.z), v[3] = __uint_as_float(chunk.w);
}
template <typename T>
__device__ __forceinline__ void columns_of(const T* from, float (&v)[W]) {
    unpack(*reinterpret_cast<const typename Chunk<W * sizeof(T)>::type*>(from), v);
}
__device__ __forceinline__ float2 two_columns_of(const bf16* from) {
    const uint32_t both = *reinterpret_cast<const uint32_t*>(from);
    return make_float2(low_half(both), high_half(both));
}
__device__ __forceinline__ float2 two_columns_of(const float* from) { return *reinterpret_cast<const float2*>(from); }

// This rank's part of a thread's columns.
template <bool WIDE, typename T>
__device__ __forceinline__ void own_part(const Args<T>& a, const Place& p, int64_t token, float (&own)[W]) {
    const float* from = a.peers.part + token * a.peers.stride + p.d;
    load<W>(from, own, p.left, p.wide && (WIDE || reinterpret_cast<uintptr_t>(from) % 16 == 0));
}

// h' = post y + comb^T h, rounded, of a thread's columns in all streams of a token: into `streams` and written.
template <bool WIDE, typename T>
__device__ __forceinline__ void leave_token(const Args<T>& a, const Place& p, int64_t token, T (&streams)[M][COLUMNS]) {
    const bool alone = !a.peers.any();
    const T* h = a.h + token * M * a.D;
    const T* y = alone ? a.y + token * a.y_stride : h;
    Raw<T, M + 1> old;  // and y
    old.load(p, [&](int j) { return j < M ? h + static_cast<int64_t>(j) * a.D : y; });
    float own[W] = {}, mixes[M][M], gains[M], v[M][W] = {}, from[W];
    uint32_t turn = 0;
    if (!alone) own_part<WIDE>(a, p, token, own), turn = a.peers.turn_of(token);
#pragma unroll
    for (int j = 0; j < M; ++j) load<M>(a.comb + (token * M + j) * M, mixes[j], M, WIDE);
    load<M>(a.post + token * M, gains, M, WIDE);
#pragma unroll
    for (int j = 0; j < M; ++j) {
        unpack(old.of[j].chunk, from);
#pragma unroll
        for (int stream = 0; stream < M; ++stream)
#pragma unroll
            for (int k = 0; k < W; ++k) v[stream][k] = fmaf(from[k], mixes[j][stream], v[stream][k]);
    }
    if (!alone && p.left > 0) a.peers.hear_four(token, p.d, own, turn);
    unpack(old.of[M].chunk, from);
    if (!alone)
#pragma unroll
        for (int k = 0; k < W; ++k) from[k] = rounded<T>(own[k]);
#pragma unroll
    for (int stream = 0; stream < M; ++stream) {
#pragma unroll
        for (int k = 0; k < W; ++k) v[stream][k] = fmaf(from[k], gains[stream], v[stream][k]);
        store<W>(&streams[stream][p.column], v[stream], W, true);
        if (p.left > 0) store<W>(a.h_out + (token * M + stream) * a.D + p.d, v[stream], p.left, p.wide);
    }
}

// A block's shares of the sums with fn, in parts, two tokens at a time. By the makers.
template <Kind KIND, typename T>
__device__ __forceinline__ void parts_of_rows(const RowsOfFn<KIND>& fn, Row<KIND, T>* rows, int count) {
    using G = Together<KIND>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = warp % G::TEAMS;
    const int half = lane / QUADS, column = lane % QUADS * W, row = team * G::SHARE + lane / 4 % 4;
    float f[G::SHARE][2][W];
#pragma unroll
    for (int i = 0; i < G::SHARE; ++i)
#pragma unroll
        for (int side = 0; side < 2; ++side) load<W>(&fn[team * G::SHARE + i][2 * half + side][column], f[i][side], W, true);
#pragma unroll 1
    for (int first = warp / G::TEAMS * 2; first < count; first += G::MAKERS / G::TEAMS * 2) {
        float sums[2][G::SHARE], square[2];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            float sides[G::SHARE][2] = {}, squares[2] = {};
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                float v[W];
                columns_of(&rows[first + t].streams[2 * half + side][column], v);
#pragma unroll
                for (int k = 0; k < W; ++k) {
#pragma unroll
                    for (int i = 0; i < G::SHARE; ++i) sides[i][side] = fmaf(f[i][side][k], v[k], sides[i][side]);
                    if constexpr (KIND != SEAM) squares[side] = fmaf(v[k], v[k], squares[side]);
                }
            }
#pragma unroll
            for (int i = 0; i < G::SHARE; ++i) sums[t][i] = sides[i][0] + sides[i][1];
            square[t] = squares[0] + squares[1];
        }
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            sums[t][0] = four_sums<16>(sums[t]);
            if constexpr (KIND != SEAM) square[t] = lane_sum<16>(square[t]);
        }
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            if (lane % 4 == 0) rows[first + t].parts[2 * row + half] = sums[t][0];
            if (KIND != SEAM && lane % QUADS == 0) rows[first + t].parts[2 * Shape<KIND>::ROWS + half] = square[t];
        }
    }
}

// Its shares of the products of streams: a token to half a warp. By the other workers.
template <typename T>
__device__ __forceinline__ void parts_of_pairs(Row<SEAM, T>* rows, int count) {
    using G = Together<SEAM>;
    const int lane = threadIdx.x % 32, place = lane % QUADS;
    const int begin = (static_cast<int>(threadIdx.x) / 32 - G::MAKERS) * 2;
#pragma unroll 1
    for (int first = begin; first < count; first += (G::WARPS - G::MAKERS) * 2) {
        Row<SEAM, T>& row = rows[first + lane / QUADS];
        float2 v[2][M];
#pragma unroll
        for (int j = 0; j < M; ++j) {
            v[0][j] = two_columns_of(&row.streams[j][2 * place]);
            v[1][j] = two_columns_of(&row.streams[j][COLUMNS / 2 + 2 * place]);
        }
        float sums[(PAIRS + 3) / 4];
#pragma unroll
        for (int group = 0; group < PAIRS; group += 4) {
            float products[4] = {};
#pragma unroll
            for (int i = 0; i < 4 && group + i < PAIRS; ++i) {
                const int shift = 4 * (group + i);
                const int one = 0x2110003210ull >> shift & 3, other = 0x3323213210ull >> shift & 3;
                products[i] = fmaf(v[0][one].x, v[0][other].x, __fmul_rn(v[0][one].y, v[0][other].y)) +
                              fmaf(v[1][one].x, v[1][other].x, __fmul_rn(v[1][one].y, v[1][other].y));
            }
            sums[group / 4] = four_sums<16>(products);
        }
#pragma unroll
        for (int group = 0; group < PAIRS; group += 4)
            if (lane % 4 == 0) row.parts[2 * G::HALVED + group + lane / 4 % 4] = sums[group / 4];
    }
}

// The block's shares of word `word`'s sums.
template <Kind KIND>
__device__ __forceinline__ void shares_of_parts(const float (&parts)[Together<KIND>::PARTS], int word,
                                                float (&values)[exchange::PER_WORD]) {
    constexpr int HALVED = Together<KIND>::HALVED;
    const int first = word * exchange::PER_WORD;
#pragma unroll
    for (int i = 0; i < exchange::PER_WORD; ++i)
        values[i] = first < HALVED ? parts[2 * (first + i)] + parts[2 * (first + i) + 1] : parts[HALVED + first + i];
}

// Block (slice, group of `together` tokens), Together::THREADS threads, bytes_together of memory.
template <Kind KIND, bool WIDE, typename T>
__device__ __forceinline__ void enter_together(const Args<T>& a, WordsOfMany<KIND>& words, int together) {
    using S = Shape<KIND>;
    using G = Together<KIND>;
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ __align__(16) float totals[2][S::WORDS * exchange::PER_WORD];
    __shared__ uint32_t turns[MANY_ROWS];
    RowsOfFn<KIND>& fn = *reinterpret_cast<RowsOfFn<KIND>*>(memory);
    Row<KIND, T>* rows = reinterpret_cast<Row<KIND, T>*>(memory + sizeof(fn));
    Place p(blockIdx.x, a.D, a.wide);  // four columns, of whatever stream
    if constexpr (WIDE) p.left = W, p.wide = true;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = blockIdx.x, slices = gridDim.x;
    const int first = blockIdx.y * together, count = min(together, static_cast<int>(a.tokens) - first);
    const int own = warp < G::WARPS ? threadIdx.x / QUADS : count;  // this thread's first token; none of the last warps

    let_next_start();
#pragma unroll 1
    for (int i = threadIdx.x / QUADS; i < S::ROWS * M; i += G::THREADS / QUADS) {
        const float* from = a.fn + static_cast<int64_t>(i) * a.D + p.d;
        float* to = &fn[0][0][0] + i * COLUMNS + p.column;
        if (p.wide)
            start_copy16(shared_address(to), from);
        else
            for (int k = 0; k < W; ++k) to[k] = k < p.left ? from[k] : 0.0f;
    }
    if constexpr (WIDE) {  // what others have come between: the old streams, and the words that this block will hear
        const T* old = a.h + slice * COLUMNS + threadIdx.x % 4 * QUADS;
#pragma unroll 1
        for (int t = own; t < count; t += G::TOKENS)
            ask_for(old + (static_cast<int64_t>(first + t) * M + threadIdx.x / 4 % M) * a.D);
        if (warp < S::WORDS && slice < count)
#pragma unroll 1
            for (int i = 2 * lane; i < slices; i += 64) ask_for(&words.sums[first + slice][warp][i]);
    }
#pragma unroll 1
    for (int t = threadIdx.x; t < count; t += G::THREADS) {
        ask_for(&words.turns[first + t]);
        if (a.peers.any()) ask_for(&a.peers.turns[first + t]);
    }
    wait_for_previous();

    if (a.peers.any())
#pragma unroll 1
        for (int t = own; t < count; t += G::TOKENS) {
            float part[W];
            const uint32_t turn = a.peers.turn_of(first + t);
            own_part<WIDE>(a, p, first + t, part);
            if (p.left > 0) a.peers.tell_four(first + t, p.d, part, turn);
        }
    if (warp == G::WARPS)
#pragma unroll 1
        for (int t = lane; t < count; t += 32) turns[t] = exchange::last_turn(&words.turns[first + t]) + 1;
#pragma unroll 1
    for (int t = own; t < count; t += G::TOKENS) leave_token<WIDE>(a, p, first + t, rows[t].streams);
    wait_for_copies();
    __syncthreads();
    if (warp < G::MAKERS)
        parts_of_rows<KIND>(fn, rows, count);
    else if constexpr (KIND == SEAM)
        if (warp < G::WARPS) parts_of_pairs(rows, count);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < count * S::WORDS; i += G::THREADS) {
        const int t = i / S::WORDS, word = i % S::WORDS;
        float values[exchange::PER_WORD];
        shares_of_parts<KIND>(rows[t].parts, word, values);
        exchange::tell(&words.sums[first + t][word][slice], values, turns[t]);
    }
    float weight[W] = {};
    if constexpr (KIND == SEAM) load<W>(a.weight + p.d, weight, p.left, p.wide);

    int turn = 0;
#pragma unroll 1
    for (int t = slice; t < count; t += slices, turn ^= 1) {
        if (warp < S::WORDS) {
            const WordOfSlices all[1] = {{true, warp, turns[t], words.sums[first + t][warp], totals[turn]}};
            hear_slices<2>(all, slices);
        }
        float scale = 0.0f, base = 0.0f;
        if (warp >= G::WARPS) scale = scale_of<KIND>(a, lane), base = a.base[row_of<KIND>(lane)];
        __syncthreads();
        if (warp < G::WARPS) continue;
        const float z = mix<KIND>(a, totals[turn], scale, base);
        if constexpr (S::ENTERS) {
            if (warp > G::WARPS) {
                finish_mixes(a, first + t, z);
                continue;
            }
        }
        const float gain = sigmoid(z) + a.hc_eps;
        float pre[M], factor = 1.0f;
#pragma unroll
        for (int j = 0; j < M; ++j) pre[j] = __shfl_sync(ALL, gain, j);
        if constexpr (KIND == SEAM) factor = norm_factor(a, totals[turn], pre);
        if (lane < G::GAINS) {
            const float values[exchange::PER_WORD] = {lane ? pre[3] : pre[0], lane ? factor : pre[1], pre[2]};
            exchange::tell(&words.gains[first + t][lane], values, turns[t]);
        }
    }
    if (warp >= G::WARPS) return;
#pragma unroll 1
    for (int pair = 2 * warp; pair < count; pair += G::TOKENS) {  // lanes look at a word each, and tell each other
        const int t = min(pair + lane / QUADS, count - 1);
        exchange::Word word;
        do word = exchange::look(&words.gains[first + t][lane % 2]);
        while (__any_sync(ALL, word.turn != turns[t]));
        // Every block has told its shares of this token: the numbers of its turn have been read.
        if (slice == 0 && lane % QUADS == 0) {
            words.turns[first + t] = turns[t];
            if (a.peers.any() && t == pair + lane / QUADS) a.peers.turns[first + t] = a.peers.turn_of(first + t);
        }
        const float pre[M] = {__shfl_sync(ALL, word.values[0], lane & ~1), __shfl_sync(ALL, word.values[1], lane & ~1),
                              __shfl_sync(ALL, word.values[2], lane & ~1), __shfl_sync(ALL, word.values[0], lane | 1)};
        const float factor = __shfl_sync(ALL, word.values[1], lane | 1);
        float x[W] = {};
#pragma unroll
        for (int j = 0; j < M; ++j) {
            float v[W];
            columns_of(&rows[t].streams[j][p.column], v);
#pragma unroll
            for (int k = 0; k < W; ++k) x[k] = fmaf(pre[j], v[k], x[k]);
        }
#pragma unroll
        for (int k = 0; k < W; ++k) {
            x[k] = rounded<T>(x[k]);
            if constexpr (KIND == SEAM) x[k] = x[k] * factor * weight[k];
        }
        if (p.left > 0 && t == pair + lane / QUADS)
            store<W>(a.x_out + (first + t) * static_cast<int64_t>(a.D) + p.d, x, p.left, p.wide);
    }
}

// An op's kernels: of one launch, with one token or two to a block; of two, the first with SOME or twice as many; of one
// launch, where a site is left, with any number, and of those what is WIDE, if T is usual.
template <typename T>
constexpr bool USUAL = sizeof(T) == 2;
template <typename T>
struct Kernels {
    void (*one)(Args<T>), (*two)(Args<T>), (*some)(Args<T>), (*many)(Args<T>), (*end)(Args<T>, int);
    void (*together)(Args<T>, int) = nullptr, (*together_wide)(Args<T>, int) = nullptr;
};

// Whether all blocks run at once, and if so the launch. One block to a processor, so each takes half of its memory: where
// the kernel in front ends sooner on some processors, these would get two, which take twice as long; and the second may
// find that the memory is still shared out as the kernel in front wanted it, and wait for the first, which waits for it.
template <Kind KIND, typename T>
static cudaError_t run_together(const Kernels<T>& kernels, const Args<T>& args, int slices, int device, int processors,
                                cudaStream_t stream, bool& fits) {
    constexpr int THREADS = Together<KIND>::THREADS;
    const int groups = processors / slices, tokens = static_cast<int>(args.tokens);
    fits = false;
    if (groups == 0 || args.tokens > MANY_ROWS || (args.peers.size > 1 && args.D > MANY_COLUMNS)) return cudaSuccess;
    int shared = 0;
    if (const cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device))
        return error;
    const bool wide = args.wide && args.D % COLUMNS == 0 && aligned16(args.comb) && aligned16(args.post) &&
                      (args.peers.size < 2 || (args.peers.stride % W == 0 && aligned16(args.peers.part)));
    const auto kernel = wide ? kernels.together_wide : kernels.together;
    const int together = (tokens + groups - 1) / groups, needed = static_cast<int>(bytes_together<KIND, T>(together));
    const int bytes = needed > shared / 2 ? needed : shared / 2;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) {
        cudaGetLastError();  // more than a block may have
        return cudaSuccess;
    }
    fits = true;
    return launch_dependent(kernel, slices, (tokens + together - 1) / together, THREADS, bytes, stream, args, together);
}

}  // namespace dsv4::mhc
