// A token's part in its compressor's state and the entry it completes, by one block.
#pragma once
#include <dsv4/fragments.cuh>
#include <dsv4/kv_store.cuh>
#include <dsv4/launch.cuh>

namespace dsv4::compress {

constexpr int MAX_THREADS = 512, W = 4, AT_ONCE = 8;  // channels per thread, if not said otherwise; items in flight

struct Arguments {
    const float *u, *g, *ape, *weight;
    float* state;
    void* pool;
    const float2* cis;
    const int64_t *phase, *write_rows, *write_to, *history, *items, *entry_to;
    int64_t tokens, written, held, entries, u_stride, g_stride, cis_stride;
    int channels, n, width, dims, bytes;  // C; items per entry; N; R; bytes of a packed entry or key, 0 = values
    float eps, factor;                    // factor: N^-0.5 of the Hadamard transform
    bool from_state, quantize, vectors, wide;
};

// The parameters of a launcher, and the arguments they make; k tells several apart.
#define COMPRESS_PARAMETERS(k)                                                                                        \
    const float *u##k, const float *g##k, const float *ape##k, const float *weight##k, float *state##k, void *pool##k, \
        const float2 *cis##k, const int64_t *phase##k, const int64_t *write_rows##k, const int64_t *write_to##k,       \
        const int64_t *history##k, const int64_t *items##k, const int64_t *entry_to##k, int64_t tokens##k,             \
        int64_t written##k, int64_t held##k, int64_t entries##k, int64_t u_stride##k, int64_t g_stride##k,             \
        int64_t cis_stride##k, int channels##k, int n##k, int width##k, int dims##k, int bytes##k, float eps##k,       \
        float factor##k, int from_state##k, int quantize##k, int index##k, int dtype##k
#define COMPRESS_VALUES(k)                                                                                            \
    u##k, g##k, ape##k, weight##k, state##k, pool##k, cis##k, phase##k, write_rows##k, write_to##k, history##k,        \
        items##k, entry_to##k, tokens##k, written##k, held##k, entries##k, u_stride##k, g_stride##k, cis_stride##k,    \
        channels##k, n##k, width##k, dims##k, bytes##k, eps##k, factor##k, from_state##k, quantize##k, index##k, dtype##k

inline Arguments arguments(COMPRESS_PARAMETERS()) {
    const bool vectors = width % W == 0 && channels % W == 0 && u_stride % W == 0 && g_stride % W == 0 &&
                         aligned16(u) && aligned16(g) && aligned16(ape) && aligned16(state);
    const bool wide = width % 8 == 0 && aligned16(weight) && (bytes > 0 || aligned16(pool));
    return {u,        g,        ape,     weight,  state,    pool,  cis,   phase,  write_rows,
            write_to, history,  items,   entry_to, tokens,  written, held, entries, u_stride,
            g_stride, cis_stride, channels, n,     width,   dims,  bytes, eps,    factor,
            from_state != 0, quantize != 0, vectors, wide};
}

__device__ __forceinline__ void copy_async4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// What is above is asked for before anything below is waited for.
__device__ __forceinline__ void ask_first() { asm volatile("" ::: "memory"); }

// Below, WHOLE: of a decode step, vectors and wide, n a multiple of AT_ONCE, known when the code is compiled.
// Token `token` to row `to` of the state, -1: nowhere.
template <bool WHOLE = false>
__device__ inline void write_state(const Arguments& a, int64_t token, int64_t to) {
    const float *u = a.u + token * a.u_stride, *g = a.g + token * a.g_stride;
    const int64_t phase = a.phase[token];
#pragma unroll 1
    for (int c = threadIdx.x * W; c < a.channels; c += blockDim.x * W) {
        const int left = a.channels - c;
        float value[W], gate[W], bias[W];
        load<W>(u + c, value, left, WHOLE || a.vectors);
        load<W>(g + c, gate, left, WHOLE || a.vectors);
        ask_first();
        if (to < 0) return;
        load<W>(a.ape + phase * a.channels + c, bias, left, WHOLE || a.vectors);
        float* at = a.state + to * 2 * a.channels + c;
#pragma unroll
        for (int k = 0; k < W; ++k) gate[k] += bias[k];
        store<W>(at, value, left, WHOLE || a.vectors);
        store<W>(at + a.channels, gate, left, WHOLE || a.vectors);
    }
}

// In a decode step: token i, if there is one and it stays.
template <bool WHOLE = false>
__device__ inline void keep_token(const Arguments& a, int64_t i) {
    if ((WHOLE || a.from_state) && i < a.tokens) write_state<WHOLE>(a, i, a.write_to[i]);
}

// Softmax-weighted sums of W channels over some of an entry's items: the largest gate, and the sums relative to it.
template <int W>
struct Pooled {
    float top[W], total[W], sum[W];

    __device__ Pooled() {
#pragma unroll
        for (int k = 0; k < W; ++k) top[k] = -INFINITY, total[k] = sum[k] = 0.0f;
    }
    __device__ static float base(float top) { return top == -INFINITY ? 0.0f : top; }  // of nothing: exp(-inf - 0) = 0
};

// AT_ONCE of an entry's items; -1 for none.
__device__ __forceinline__ void load_items(int (&rows)[AT_ONCE], const int64_t* items, int first, int n) {
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) rows[j] = first + j < n ? static_cast<int>(items[first + j]) : -1;
}

// Where item `item` has its channels c ..: the newer half of overlapping items gives the upper half of them.
__device__ __forceinline__ int channel_of(const Arguments& a, int item, int c) {
    return a.channels == 2 * a.width && 2 * item >= a.n ? a.width + c : c;
}

// Of a decode step: the token that completes an entry.
struct Newest {
    int token;
    int64_t phase;
};

// The token whose place in the state is the entry's last item: by all likelihood that of the entry's number, whose place
// is `own` and whose phase is `phase`.
__device__ __forceinline__ Newest newest(const Arguments& a, int64_t e, int64_t last, int64_t own, int64_t phase) {
    if (e < a.tokens && own == last) return {static_cast<int>(e), phase};
    int token = 0;
#pragma unroll 1
    while (token + 1 < a.tokens && a.write_to[token] != last) ++token;
    return {token, a.phase[token]};
}

// rows: those of the group's first items, then of the first of the group `together` further on.
template <int W, bool WHOLE>
__device__ __forceinline__ Pooled<W> pool_items(const Arguments& a, const int64_t* items, int (&rows)[AT_ONCE],
                                                const Newest& newest, int group, int groups, int together, int c) {
    Pooled<W> p;
    const int left = a.width - c;
#pragma unroll 1
    for (int first = group * AT_ONCE; first < a.n; first += groups * AT_ONCE) {
        float u[AT_ONCE][W], g[AT_ONCE][W], own[W] = {}, top[W];  // own: the newest token's bias
        unsigned absent = 0;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {  // rows of the state; ~token: of this step; of an absent item any to be read
            if (rows[j] < 0) {
                absent |= 1u << j;
                rows[j] = WHOLE ? 0 : ~newest.token;
            } else if (WHOLE) {
                continue;
            } else if (a.from_state) {
                if (first + j == a.n - 1) rows[j] = ~newest.token;
            } else {
                rows[j] = static_cast<int>(rows[j] < a.held ? a.history[rows[j]] : ~(rows[j] - a.held));
            }
        }
        const bool last = first + AT_ONCE >= a.n;  // WHOLE: the newest token's item is the last of these
        const auto fresh = [&](int j) { return WHOLE ? last && j == AT_ONCE - 1 : rows[j] < 0; };
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {  // no branch: all loads are in flight together
            const int token = WHOLE ? newest.token : ~rows[j];
            const int at = channel_of(a, first + j, c);
            const float* state = a.state + static_cast<int64_t>(rows[j]) * 2 * a.channels;
            load<W>((fresh(j) ? a.u + token * a.u_stride : state) + at, u[j], left, WHOLE || a.vectors);
            load<W>((fresh(j) ? a.g + token * a.g_stride : state + a.channels) + at, g[j], left, WHOLE || a.vectors);
        }
        if ((WHOLE || a.from_state) && last)
            load<W>(a.ape + newest.phase * a.channels + channel_of(a, a.n - 1, c), own, left, WHOLE || a.vectors);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (absent >> j & 1) {
#pragma unroll
                for (int k = 0; k < W; ++k) u[j][k] = 0.0f, g[j][k] = -INFINITY;
            } else if (fresh(j)) {
                float bias[W];
                if (WHOLE || a.from_state) {
#pragma unroll
                    for (int k = 0; k < W; ++k) bias[k] = own[k];
                } else {
                    load<W>(a.ape + a.phase[~rows[j]] * a.channels + channel_of(a, first + j, c), bias, left, WHOLE || a.vectors);
                }
#pragma unroll
                for (int k = 0; k < W; ++k) g[j][k] += bias[k];
            }
        }
#pragma unroll
        for (int k = 0; k < W; ++k) {
            top[k] = p.top[k];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) top[k] = fmaxf(top[k], g[j][k]);
            const float base = Pooled<W>::base(top[k]), keep = expf(p.top[k] - base);
            p.top[k] = top[k], p.total[k] *= keep, p.sum[k] *= keep;
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const float weight = expf(g[j][k] - base);
                p.total[k] += weight;
                p.sum[k] = fmaf(weight, u[j][k], p.sum[k]);
            }
        }
        const int next = first + groups * AT_ONCE;
        load_items(rows, items, next < a.n ? next : (group + together) * AT_ONCE, a.n);
    }
    return p;
}

// How many groups of threads share an entry's items, and what that takes.
inline int groups_of(const Arguments& a) {
    const int lanes = (a.width + W - 1) / W, most = MAX_THREADS / lanes, wanted = (a.n + AT_ONCE - 1) / AT_ONCE;
    const int groups = wanted < most ? wanted : most;
    return groups > 1 ? groups : 1;
}
inline int threads_of(const Arguments& a) { return (groups_of(a) * ((a.width + W - 1) / W) + 31) / 32 * 32; }
inline size_t shared_of(const Arguments& a) {
    const int groups = groups_of(a);
    return (2 * a.width + a.dims + (groups > 1 ? groups * 3 * a.width : 0)) * sizeof(float);
}

// Pools the entry that is numbered i; where it goes, -1 if there is none. Shared, aligned to 16 bytes: the pooled row [N],
// the norm's weight [N], the rotations [R / 2], then, where groups of threads share the items, their sums [groups][3][N].
template <int W, typename T, bool WHOLE = false>
__device__ __forceinline__ int64_t pool_entry(const Arguments& a, int64_t i, int groups, float* shared) {
    if (i >= a.entries) return -1;
    const int lanes = (a.width + W - 1) / W, group = threadIdx.x / lanes, c = threadIdx.x % lanes * W;
    const int64_t to = a.entry_to[i], *items = a.items + i * a.n, last = items[a.n - 1];
    const bool fresh = (WHOLE || a.from_state) && i < a.tokens;
    const int64_t own = fresh ? a.write_to[i] : -1, phase = fresh ? a.phase[i] : 0;
    int rows[AT_ONCE];
    load_items(rows, items, group * AT_ONCE, a.n);
    ask_first();
    if (to < 0) return -1;
#pragma unroll 1
    for (int d = threadIdx.x; d < a.width; d += blockDim.x) copy_async4(shared + a.width + d, a.weight + d);
#pragma unroll 1
    for (int d = threadIdx.x; d < a.dims / 2; d += blockDim.x)
        copy_async8(shared + 2 * a.width + 2 * d, a.cis + i * a.cis_stride + d);
    float* parts = shared + 2 * a.width + a.dims;
    const int together = blockDim.x / lanes;
    if (group < min(together, groups)) {
        const Newest token = (WHOLE || a.from_state) ? newest(a, i, last, own, phase) : Newest{};  // in a chunk: any
#pragma unroll 1
        for (int part = group; part < groups; part += together) {
            const Pooled<W> p = pool_items<W, WHOLE>(a, items, rows, token, part, groups, together, c);
            float* at = groups > 1 ? parts + part * 3 * a.width + c : shared + c;
#pragma unroll
            for (int k = 0; k < W; ++k) {
                if (c + k >= a.width) continue;
                if (groups > 1) at[k] = p.top[k], at[a.width + k] = p.total[k], at[2 * a.width + k] = p.sum[k];
                else at[k] = rounded<T>(p.sum[k] / p.total[k]);
            }
        }
    }
    if (groups > 1) {
        __syncthreads();
#pragma unroll 1
        for (int d = threadIdx.x; d < a.width; d += blockDim.x) {
            float top = -INFINITY, total = 0.0f, sum = 0.0f;
#pragma unroll 1
            for (int k = 0; k < groups; ++k) top = fmaxf(top, parts[k * 3 * a.width + d]);
#pragma unroll 1
            for (int k = 0; k < groups; ++k) {
                const float* at = parts + k * 3 * a.width + d;
                const float keep = expf(at[0] - Pooled<W>::base(top));
                total = fmaf(at[a.width], keep, total);
                sum = fmaf(at[2 * a.width], keep, sum);
            }
            shared[d] = rounded<T>(sum / total);
        }
    }
    copies_wait();
    __syncthreads();
    return to;
}

// The norm's weight and the rotations are where pool_entry has left them.
__device__ __forceinline__ kv_store::Form form(const Arguments& a, const float* shared, bool index, bool packed) {
    const float2* turn = reinterpret_cast<const float2*>(shared + 2 * a.width);
    return {shared + a.width, turn, a.width, a.dims, a.bytes, a.eps, a.factor, a.wide, packed || a.quantize, packed, index};
}

// Makes and stores the pooled entry, by the first warp.
template <typename T, int ITER, bool INDEX, bool PACKED>
__device__ void finish(const Arguments& a, const float* shared, int64_t to) {
    kv_store::Row<ITER> row = {};
#pragma unroll
    for (int it = 0; it < ITER; ++it)
        kv_store::load_channels<false>(shared, row.v[it], kv_store::channel(it), a.width, a.wide);
    const kv_store::Form made = form(a, shared, INDEX, PACKED);
    kv_store::make<T, false>(row, made);
    kv_store::put<T, false>(row, made, a.pool, to);
}

}  // namespace dsv4::compress
