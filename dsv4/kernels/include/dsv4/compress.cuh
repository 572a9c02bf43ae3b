// A token's part in its compressor's state and the entry it completes, by one block.
#pragma once
#include <dsv4/kv_store.cuh>
#include <dsv4/launch.cuh>

namespace dsv4::compress {

constexpr int MAX_THREADS = 512, W = 4, AT_ONCE = 8;  // channels per thread; items in flight

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

__device__ inline void write_state(const Arguments& a, int64_t token, int64_t to) {
    const float *u = a.u + token * a.u_stride, *g = a.g + token * a.g_stride, *ape = a.ape + a.phase[token] * a.channels;
    float* at = a.state + to * 2 * a.channels;
    for (int c = threadIdx.x * W; c < a.channels; c += blockDim.x * W) {
        const int left = a.channels - c;
        float value[W], gate[W], bias[W];
        load<W>(u + c, value, left, a.vectors);
        load<W>(g + c, gate, left, a.vectors);
        load<W>(ape + c, bias, left, a.vectors);
#pragma unroll
        for (int k = 0; k < W; ++k) gate[k] += bias[k];
        store<W>(at + c, value, left, a.vectors);
        store<W>(at + a.channels + c, gate, left, a.vectors);
    }
}

// The token of this step that completes entry e, by its place in the state.
__device__ inline int newest(const Arguments& a, int64_t e) {
    const int64_t row = a.items[e * a.n + a.n - 1];
    if (e < a.tokens && a.write_to[e] == row) return static_cast<int>(e);
    int token = 0;
    while (token + 1 < a.tokens && a.write_to[token] != row) ++token;
    return token;
}

// Softmax-weighted sums of W channels over some of an entry's items: the largest gate, and the sums relative to it.
struct Pooled {
    float top[W], total[W], sum[W];

    __device__ Pooled() {
#pragma unroll
        for (int k = 0; k < W; ++k) top[k] = -INFINITY, total[k] = sum[k] = 0.0f;
    }
    __device__ static float base(float top) { return top == -INFINITY ? 0.0f : top; }  // of nothing: exp(-inf - 0) = 0
};

__device__ inline Pooled pool_items(const Arguments& a, int64_t e, int token, int group, int groups, int c) {
    Pooled p;
    const bool overlap = a.channels == 2 * a.width;
    const int64_t* items = a.items + e * a.n;
    const int left = a.width - c;
    for (int first = group * AT_ONCE; first < a.n; first += groups * AT_ONCE) {
        float u[AT_ONCE][W], g[AT_ONCE][W], top[W];
        int rows[AT_ONCE];  // of the state; ~token for one of this step; of an absent item any that can be read
        unsigned absent = 0;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const int item = first + j;
            rows[j] = item < a.n ? static_cast<int>(items[item]) : -1;
            if (rows[j] < 0) {
                absent |= 1u << j;
                rows[j] = ~token;
            } else if (a.from_state) {
                if (item == a.n - 1) rows[j] = ~token;
            } else {
                rows[j] = static_cast<int>(rows[j] < a.held ? a.history[rows[j]] : ~(rows[j] - a.held));
            }
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {  // no branch: all loads are in flight together
            const bool fresh = rows[j] < 0;
            const int at = overlap && 2 * (first + j) >= a.n ? a.width + c : c;  // the newer half of the items: B
            const float* state = a.state + static_cast<int64_t>(rows[j]) * 2 * a.channels;
            load<W>((fresh ? a.u + ~rows[j] * a.u_stride : state) + at, u[j], left, a.vectors);
            load<W>((fresh ? a.g + ~rows[j] * a.g_stride : state + a.channels) + at, g[j], left, a.vectors);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const int at = overlap && 2 * (first + j) >= a.n ? a.width + c : c;
            if (absent >> j & 1) {
#pragma unroll
                for (int k = 0; k < W; ++k) u[j][k] = 0.0f, g[j][k] = -INFINITY;
            } else if (rows[j] < 0) {
                float bias[W];
                load<W>(a.ape + a.phase[~rows[j]] * a.channels + at, bias, left, a.vectors);
#pragma unroll
                for (int k = 0; k < W; ++k) g[j][k] += bias[k];
            }
        }
#pragma unroll
        for (int k = 0; k < W; ++k) {
            top[k] = p.top[k];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) top[k] = fmaxf(top[k], g[j][k]);
            const float base = Pooled::base(top[k]), keep = expf(p.top[k] - base);
            p.top[k] = top[k], p.total[k] *= keep, p.sum[k] *= keep;
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const float weight = expf(g[j][k] - base);
                p.total[k] += weight;
                p.sum[k] = fmaf(weight, u[j][k], p.sum[k]);
            }
        }
    }
    return p;
}

template <typename T, int ITER, bool INDEX, bool PACKED>
__device__ void finish(const Arguments& a, const float* pooled, int64_t e, int64_t to) {
    kv_store::Row<ITER> row;
#pragma unroll
    for (int it = 0; it < ITER; ++it) {
        const int i = kv_store::channel(it);
#pragma unroll
        for (int k = 0; k < 8; ++k) row.v[it][k] = i + k < a.width ? pooled[i + k] : 0.0f;
    }
    kv_store::norm_rope<T>(row.v, a.weight, a.cis + e * a.cis_stride, a.width, a.dims, a.eps, a.wide);
    if (PACKED || a.quantize) {
        if constexpr (INDEX)
            kv_store::round_index_key<T>(row, a.width, a.factor);
        else
            kv_store::round_entry(row, a.width - a.dims);
    }
    uint8_t* bytes = static_cast<uint8_t*>(a.pool) + to * a.bytes;
    if constexpr (!PACKED)
        kv_store::store_values(row, static_cast<T*>(a.pool) + to * a.width, a.width, a.wide);
    else if constexpr (INDEX)
        kv_store::store_index_key(row, bytes, a.width);
    else
        kv_store::store_entry(row, bytes, a.width, a.dims, a.bytes);
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
    return (a.width + (groups > 1 ? groups * 3 * a.width : 0)) * sizeof(float);
}

// Shared: the pooled row [N], then, where several groups of threads share the items, their sums [groups][3][N].
template <typename T, int ITER, bool INDEX, bool PACKED>
__device__ void take(const Arguments& a, int64_t i, int groups, float* shared) {
    if (a.from_state && i < a.tokens && a.write_to[i] >= 0) write_state(a, i, a.write_to[i]);
    const int64_t to = i < a.entries ? a.entry_to[i] : -1;
    if (to < 0) return;
    const int token = a.from_state ? newest(a, i) : 0;  // in a chunk: any
    const int lanes = (a.width + W - 1) / W, group = threadIdx.x / lanes, c = threadIdx.x % lanes * W;
    float* parts = shared + a.width;
    Pooled p;
    if (group < groups) p = pool_items(a, i, token, group, groups, c);
    if (groups > 1) {
#pragma unroll
        for (int k = 0; k < W; ++k)
            if (group < groups && c + k < a.width) {
                float* at = parts + group * 3 * a.width + c + k;
                at[0] = p.top[k], at[a.width] = p.total[k], at[2 * a.width] = p.sum[k];
            }
        __syncthreads();
        for (int d = threadIdx.x; d < a.width; d += blockDim.x) {
            float top = -INFINITY, total = 0.0f, sum = 0.0f;
            for (int k = 0; k < groups; ++k) top = fmaxf(top, parts[k * 3 * a.width + d]);
            for (int k = 0; k < groups; ++k) {
                const float* at = parts + k * 3 * a.width + d;
                const float keep = expf(at[0] - Pooled::base(top));
                total = fmaf(at[a.width], keep, total);
                sum = fmaf(at[2 * a.width], keep, sum);
            }
            shared[d] = rounded<T>(sum / total);
        }
    } else if (group == 0) {
#pragma unroll
        for (int k = 0; k < W; ++k)
            if (c + k < a.width) shared[c + k] = rounded<T>(p.sum[k] / p.total[k]);
    }
    __syncthreads();
    if (threadIdx.x < 32) finish<T, ITER, INDEX, PACKED>(a, shared, i, to);
}

}  // namespace dsv4::compress
