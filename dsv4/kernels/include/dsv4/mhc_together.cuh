// Leaving and entering (mhc.cuh) with up to 128 tokens in one launch, whose blocks all run at once: each has 64 columns of
// some tokens and keeps their streams. A token's shares of the sums are told to one block alone, that of the slice of the
// token's number, which adds them up and tells all what they need for x: the gains, and the norm's factor. It goes on with
// Sinkhorn beside them.
//
// A thread has four columns of all streams of a token while that is left and collapsed, so that all tokens of a block are
// asked for at once; for the sums it has those of two streams, and goes through the tokens by four. What is added to what
// is as in mhc.cuh, so a row's bits are the same.
#pragma once
#include <dsv4/bulk.cuh>
#include <dsv4/dependent.cuh>
#include <dsv4/mhc.cuh>

namespace dsv4::mhc {

template <Kind KIND>
struct Together {
    using S = Shape<KIND>;
    static constexpr int SHARE = KIND == SEAM ? 3 : 2, TEAMS = S::ROWS / SHARE;  // rows of fn to a warp
    static constexpr int VALUES = SHARE + (KIND != SEAM);                        // and the squares
    static constexpr int HALVED = S::ROWS + (KIND != SEAM);                      // sums of two halves, each of two streams
    static constexpr int PARTS = KIND == SEAM ? 2 * HALVED + PAIRS + 2 : 2 * HALVED + 2;
    static constexpr int WORKERS = 512, WARPS = WORKERS / 32, THREADS = WORKERS + 32;  // and a warp for mixes
    static constexpr int TOKENS = WORKERS / QUADS;                                     // left at once
    static constexpr int GAINS = 2;                                                    // words
    static_assert(S::LEAVES && S::WORDS <= WARPS && WARPS % TEAMS == 0 && PARTS % 4 == 0);
};

// What the blocks of one launch tell each other. One per op and device.
template <Kind KIND>
struct WordsOfMany {
    exchange::Word sums[MANY_ROWS][Shape<KIND>::WORDS][MOST_SLICES], gains[MANY_ROWS][Together<KIND>::GAINS];
    uint32_t turns[MANY_ROWS];
};

// A token in a block's memory, behind that of fn.
template <Kind KIND, typename T>
struct Row {
    T streams[M][COLUMNS];
    float parts[Together<KIND>::PARTS];  // rows of fn in halves; then pairs of streams
};

template <Kind KIND>
using RowsOfFn = float[Shape<KIND>::ROWS][M][COLUMNS];

// Of so many tokens; the sums go by four.
template <Kind KIND, typename T>
constexpr size_t bytes_together(int tokens) {
    return sizeof(RowsOfFn<KIND>) + (tokens + 3) / 4 * 4 * sizeof(Row<KIND, T>);
}

// Four sums over 16 lanes; lanes 4 i .. 4 i + 3 of them get that of sums[i].
__device__ __forceinline__ float four_sums_of_half(const float (&sums)[4]) {
    const bool upper = threadIdx.x & 8, odd = threadIdx.x & 4;
    const float a = (upper ? sums[2] : sums[0]) + __shfl_xor_sync(ALL, upper ? sums[0] : sums[2], 8);
    const float b = (upper ? sums[3] : sums[1]) + __shfl_xor_sync(ALL, upper ? sums[1] : sums[3], 8);
    float sum = (odd ? b : a) + __shfl_xor_sync(ALL, odd ? a : b, 4);
    sum += __shfl_xor_sync(ALL, sum, 2);
    return sum + __shfl_xor_sync(ALL, sum, 1);
}

// This rank's part of a thread's columns.
template <typename T>
__device__ __forceinline__ void own_part(const Args<T>& a, const Place& p, int64_t token, float (&own)[W]) {
    const float* from = a.peers.part + token * a.peers.stride + p.d;
    load<W>(from, own, p.left, p.wide && reinterpret_cast<uintptr_t>(from) % 16 == 0);
}

// h' = post y + comb^T h, rounded, of a thread's columns in all streams of a token: into `streams` and written.
template <typename T>
__device__ __forceinline__ void leave_token(const Args<T>& a, const Place& p, int64_t token, T (&streams)[M][COLUMNS]) {
    const bool alone = !a.peers.any();
    const T* h = a.h + token * M * a.D;
    const T* y = alone ? a.y + token * a.y_stride : h;
    const bool even = (reinterpret_cast<uintptr_t>(a.comb) | reinterpret_cast<uintptr_t>(a.post)) % 16 == 0;
    Raw<T, M + 1> old;  // and y
    old.load(p, [&](int j) { return j < M ? h + static_cast<int64_t>(j) * a.D : y; });
    float own[W] = {}, mixes[M][M], gains[M], v[M][W] = {}, from[W];
    uint32_t turn = 0;
    if (!alone) own_part(a, p, token, own), turn = a.peers.turn_of(token);
#pragma unroll
    for (int j = 0; j < M; ++j) load<M>(a.comb + (token * M + j) * M, mixes[j], M, even);
    load<M>(a.post + token * M, gains, M, even);
#pragma unroll
    for (int j = 0; j < M; ++j)
#pragma unroll
        for (int stream = 0; stream < M; ++stream)
#pragma unroll
            for (int k = 0; k < W; ++k) v[stream][k] = fmaf(old.value(j, k), mixes[j][stream], v[stream][k]);
    if (!alone && p.left > 0) a.peers.hear_four(token, p.d, own, turn);
#pragma unroll
    for (int k = 0; k < W; ++k) from[k] = alone ? old.value(M, k) : rounded<T>(own[k]);
#pragma unroll
    for (int stream = 0; stream < M; ++stream) {
#pragma unroll
        for (int k = 0; k < W; ++k) v[stream][k] = rounded<T>(fmaf(from[k], gains[stream], v[stream][k]));
        store<W>(&streams[stream][p.column], v[stream], W, true);
        if (p.left > 0) store<W>(a.h_out + (token * M + stream) * a.D + p.d, v[stream], p.left, p.wide);
    }
}

// The block's shares of all sums, in parts. By the workers.
template <Kind KIND, typename T>
__device__ __forceinline__ void parts_of_rows(const RowsOfFn<KIND>& fn, Row<KIND, T>* rows, int count) {
    using G = Together<KIND>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = warp % G::TEAMS;
    const int half = lane / QUADS, column = lane % QUADS * W;
    float f[G::SHARE][2][W];
#pragma unroll
    for (int i = 0; i < G::SHARE; ++i)
#pragma unroll
        for (int side = 0; side < 2; ++side)
            load<W>(&fn[team * G::SHARE + i][2 * half + side][column], f[i][side], W, true);
#pragma unroll 1
    for (int first = warp / G::TEAMS * 4; first < count; first += G::WARPS / G::TEAMS * 4) {
        float sums[G::VALUES][4];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            float sides[G::VALUES][2] = {};
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                float v[W];
                load<W>(&rows[first + t].streams[2 * half + side][column], v, W, true);
#pragma unroll
                for (int k = 0; k < W; ++k)
#pragma unroll
                    for (int i = 0; i < G::VALUES; ++i)
                        sides[i][side] = fmaf(i < G::SHARE ? f[i < G::SHARE ? i : 0][side][k] : v[k], v[k], sides[i][side]);
            }
#pragma unroll
            for (int i = 0; i < G::VALUES; ++i) sums[i][t] = sides[i][0] + sides[i][1];
        }
#pragma unroll
        for (int i = 0; i < G::VALUES; ++i) {
            const float sum = four_sums_of_half(sums[i]);
            const int row = i < G::SHARE ? team * G::SHARE + i : Shape<KIND>::ROWS;
            if (lane % 4 == 0 && (i < G::SHARE || team == 0)) rows[first + lane / 4 % 4].parts[2 * row + half] = sum;
        }
    }
    if constexpr (KIND == SEAM) {
#pragma unroll 1
        for (int t = warp; t < count; t += G::WARPS) {
            float2 v[M];
#pragma unroll
            for (int j = 0; j < M; ++j)
                v[j] = make_float2(to_float(rows[t].streams[j][2 * lane]), to_float(rows[t].streams[j][2 * lane + 1]));
#pragma unroll
            for (int first = 0; first < PAIRS; first += 4) {
                float products[4] = {};
#pragma unroll
                for (int i = 0; i < 4 && first + i < PAIRS; ++i) {
                    const int shift = 4 * (first + i);
                    const float2 one = v[0x2110003210ull >> shift & 3], other = v[0x3323213210ull >> shift & 3];
                    products[i] = fmaf(one.x, other.x, __fmul_rn(one.y, other.y));
                }
                const float sum = four_sums(products);
                if (lane % 8 == 0 && first + lane / 8 < PAIRS) rows[t].parts[2 * G::HALVED + first + lane / 8] = sum;
            }
        }
    }
}

// The block's shares of word `word`'s sums.
template <Kind KIND>
__device__ __forceinline__ void shares_of_parts(const float (&parts)[Together<KIND>::PARTS], int word,
                                                float (&values)[exchange::PER_WORD]) {
    constexpr int HALVED = Together<KIND>::HALVED;
#pragma unroll
    for (int i = 0; i < exchange::PER_WORD; ++i) {
        const int sum = word * exchange::PER_WORD + i;
        values[i] = sum < HALVED ? parts[2 * sum] + parts[2 * sum + 1]
                    : sum < Shape<KIND>::SUMS ? parts[HALVED + sum]
                                              : 0.0f;
    }
}

// Block (slice, group of `together` tokens), Together::THREADS threads, bytes_together of memory.
template <Kind KIND, typename T>
__device__ __forceinline__ void enter_together(const Args<T>& a, WordsOfMany<KIND>& words, int together) {
    using S = Shape<KIND>;
    using G = Together<KIND>;
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ float totals[2][S::WORDS * exchange::PER_WORD];
    __shared__ uint32_t turns[MANY_ROWS];
    RowsOfFn<KIND>& fn = *reinterpret_cast<RowsOfFn<KIND>*>(memory);
    Row<KIND, T>* rows = reinterpret_cast<Row<KIND, T>*>(memory + sizeof(fn));
    const Place p(blockIdx.x, a.D, a.wide);  // four columns, of whatever stream
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = blockIdx.x, slices = gridDim.x;
    const int first = blockIdx.y * together, count = min(together, static_cast<int>(a.tokens) - first);
    const int own = warp < G::WARPS ? threadIdx.x / QUADS : count;  // this thread's first token; none of the last warp

    let_next_start();
    for (int i = threadIdx.x; i < S::ROWS * M * QUADS; i += G::THREADS) {
        const int d = slice * COLUMNS + i % QUADS * W;
        const float* from = a.fn + static_cast<int64_t>(i / QUADS) * a.D + d;
        float* to = &fn[0][0][0] + i * W;
        if (a.wide && d < a.D)
            start_copy16(shared_address(to), from);
        else
            for (int k = 0; k < W; ++k) to[k] = d + k < a.D ? from[k] : 0.0f;
    }
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
            own_part(a, p, first + t, part);
            if (p.left > 0) a.peers.tell_four(first + t, p.d, part, turn);
        }
    if (warp == G::WARPS)
        for (int t = lane; t < count; t += 32) turns[t] = exchange::last_turn(&words.turns[first + t]) + 1;
#pragma unroll 1
    for (int t = own; t < count; t += G::TOKENS) leave_token(a, p, first + t, rows[t].streams);
    wait_for_copies();
    __syncthreads();
    if (warp < G::WARPS) parts_of_rows<KIND, T>(fn, rows, count);
    __syncthreads();
    for (int i = threadIdx.x; i < count * S::WORDS; i += G::THREADS) {
        const int t = i / S::WORDS, word = i % S::WORDS;
        float values[exchange::PER_WORD];
        shares_of_parts<KIND>(rows[t].parts, word, values);
        exchange::tell(&words.sums[first + t][word][slice], values, turns[t]);
    }
    float weight[W] = {};
    if constexpr (KIND == SEAM) load<W>(a.weight + p.d, weight, p.left, p.wide);

    int turn = 0;
    const int begin = (slice + slices - first % slices) % slices;
#pragma unroll 1
    for (int t = begin; t < count; t += slices, turn ^= 1) {
        if (warp < S::WORDS) {
            const WordOfSlices all[1] = {{true, warp, turns[t], words.sums[first + t][warp], totals[turn]}};
            hear_slices<2>(all, slices);
        }
        float scale = 0.0f, base = 0.0f;
        if (warp == G::WARPS) scale = scale_of<KIND>(a, lane), base = a.base[row_of<KIND>(lane)];
        __syncthreads();
        if (warp < G::WARPS) continue;
        const float z = mix<KIND>(a, totals[turn], scale, base), gain = sigmoid(z) + a.hc_eps;
        float pre[M], factor = 1.0f;
#pragma unroll
        for (int j = 0; j < M; ++j) pre[j] = __shfl_sync(ALL, gain, j);
        if constexpr (KIND == SEAM) factor = norm_factor(a, totals[turn], pre);
        if (lane < G::GAINS) {
            const float values[exchange::PER_WORD] = {lane ? pre[3] : pre[0], lane ? factor : pre[1], pre[2]};
            exchange::tell(&words.gains[first + t][lane], values, turns[t]);
        }
        if constexpr (S::ENTERS) finish_mixes(a, first + t, z);
    }
#pragma unroll 1
    for (int t = own; t < count; t += G::TOKENS) {
        const exchange::Word* from = words.gains[first + t];
        exchange::Word one, other;
        do {
            one = exchange::look(from), other = exchange::look(from + 1);
        } while (one.turn != turns[t] || other.turn != turns[t]);
        // Every block has told its shares of this token: the numbers of its turn have been read.
        if (slice == 0 && threadIdx.x % QUADS == 0) {
            words.turns[first + t] = turns[t];
            if (a.peers.any()) a.peers.turns[first + t] = a.peers.turn_of(first + t);
        }
        const float pre[M] = {one.values[0], one.values[1], one.values[2], other.values[0]};
        float x[W] = {};
#pragma unroll
        for (int j = 0; j < M; ++j) {
            float v[W];
            load<W>(&rows[t].streams[j][p.column], v, W, true);
#pragma unroll
            for (int k = 0; k < W; ++k) x[k] = fmaf(pre[j], v[k], x[k]);
        }
#pragma unroll
        for (int k = 0; k < W; ++k) {
            x[k] = rounded<T>(x[k]);
            if constexpr (KIND == SEAM) x[k] = x[k] * other.values[1] * weight[k];
        }
        if (p.left > 0) store<W>(a.x_out + (first + t) * static_cast<int64_t>(a.D) + p.d, x, p.left, p.wide);
    }
}

// Whether all blocks run at once, and if so the launch. One block to a processor: of two, the second may find that the
// processor's memory is still shared out as the kernel in front wanted it, and wait for the first, which waits for it.
template <Kind KIND, typename T>
static cudaError_t run_together(void (*kernel)(Args<T>, int), const Args<T>& args, int slices, int processors,
                                cudaStream_t stream, bool& fits) {
    constexpr int THREADS = Together<KIND>::THREADS;
    const int groups = processors / slices, tokens = static_cast<int>(args.tokens);
    fits = false;
    if (groups == 0 || args.tokens > MANY_ROWS || (args.peers.size > 1 && args.D > MANY_COLUMNS)) return cudaSuccess;
    const int together = (tokens + groups - 1) / groups, bytes = static_cast<int>(bytes_together<KIND, T>(together));
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) {
        cudaGetLastError();  // more than a block may have
        return cudaSuccess;
    }
    fits = true;
    return launch_dependent(kernel, slices, (tokens + together - 1) / together, THREADS, bytes, stream, args, together);
}

}  // namespace dsv4::mhc
