// What a decode step makes of attention's input projections, row by row and part by part, a block to a part of a row: the
// norm of the query's low rank, the window's entry, the compressor's token and that of the indexer's, of which each has
// its place in the state and the entry that it may complete. No part reads what another writes.
#pragma once
#include <dsv4/compress.cuh>
#include <dsv4/kv_append.cuh>
#include <dsv4/rms_norm.cuh>

namespace dsv4::attn_inputs {

constexpr int ITER = 2;  // entries of up to 512 channels

enum Part { ENTRIES, KEYS, APPEND, NORM, STATE, KEY_STATE, PARTS };

struct Arguments {
    const bf16* qr;
    const float* q_weight;
    bf16* normed;
    int64_t q_stride;
    int q_width, q_threads;
    float eps;
    bool q_wide;
    kv_append::Arguments append;
    compress::Arguments compressions[2];
    int groups[2];
    int parts[PARTS], count;  // what there is, what takes longest first
};

#define ATTN_INPUTS_PARAMETERS                                                                                     \
    const void *qr, const float *q_weight, void *normed, int64_t q_rows, int64_t q_stride, int q_width, float q_eps, \
        KV_APPEND_PARAMETERS, COMPRESS_PARAMETERS(0), COMPRESS_PARAMETERS(1)
#define ATTN_INPUTS_VALUES \
    qr, q_weight, normed, q_rows, q_stride, q_width, q_eps, KV_APPEND_VALUES, COMPRESS_VALUES(0), COMPRESS_VALUES(1)

// threads, shared: what a block of its own needs for a part.
static cudaError_t arguments(Arguments& a, int& threads, size_t& shared, ATTN_INPUTS_PARAMETERS) {
    if (n > ITER * 256 || rows != q_rows || dtype != BF16) return cudaErrorInvalidValue;
    constexpr int WIDE = wide_elements<bf16>;
    a = {};
    a.qr = static_cast<const bf16*>(qr), a.q_weight = q_weight, a.normed = static_cast<bf16*>(normed);
    a.q_stride = q_stride, a.q_width = q_width, a.q_threads = norm_threads<bf16>(q_width), a.eps = q_eps;
    a.q_wide = q_width % WIDE == 0 && q_stride % WIDE == 0 && aligned16(qr) && aligned16(q_weight) && aligned16(normed);
    a.append = kv_append::arguments(KV_APPEND_VALUES);
    a.compressions[0] = compress::arguments(COMPRESS_VALUES(0));
    a.compressions[1] = compress::arguments(COMPRESS_VALUES(1));
    threads = a.q_threads > 32 ? a.q_threads : 32, shared = 0;
    for (int i = 0; i < 2; ++i) {
        const compress::Arguments& c = a.compressions[i];
        if (c.width == 0) continue;
        if (!c.from_state || c.tokens != q_rows || c.entries > q_rows || c.width > ITER * 256) return cudaErrorInvalidValue;
        a.groups[i] = compress::groups_of(c);
        if (compress::threads_of(c) > threads) threads = compress::threads_of(c);
        if (compress::shared_of(c) > shared) shared = compress::shared_of(c);
        a.parts[a.count++] = i == 0 ? ENTRIES : KEYS;
    }
    a.parts[a.count++] = APPEND, a.parts[a.count++] = NORM;
    return cudaSuccess;
}

// Rows are whole pieces of 16 bytes, entries have whole eights of items, and all tokens have their places: what a model's
// decode step is like.
static bool whole(const Arguments& a) {
    const auto turned = [](int dims) { return dims > 0 && dims % 8 == 0; };
    bool yes = a.q_wide && a.append.wide && turned(a.append.dims) && a.append.written == a.append.rows;
    for (const compress::Arguments& c : a.compressions)
        yes = yes && (c.width == 0 || (c.vectors && c.wide && turned(c.dims) && c.n % compress::AT_ONCE == 0));
    return yes;
}

// Every thread of the block calls; shared is aligned to 16 bytes. W: channels that a thread pools.
// WHOLE: as whole() has it, known when the code is compiled.
template <int W, bool WHOLE>
__device__ __forceinline__ void take(const Arguments& a, int part, int64_t row, float* shared) {
    if (part == STATE || part == KEY_STATE) {
        compress::keep_token<WHOLE>(a.compressions[part == KEY_STATE], row);
        return;
    }
    if (part == NORM) {
        norm_row(a.qr + row * a.q_stride, a.q_weight, a.normed + row * a.q_width, a.q_width, a.eps,
                 WHOLE || a.q_wide, a.q_threads);
        return;
    }
    // A row that the first warp makes: into the ring and the result, or into a pool.
    kv_store::Row<ITER> made = {};
    kv_store::Form form;
    void *rows, *more = nullptr;
    int64_t to, also = -1;
    if (part == APPEND) {
        if (threadIdx.x >= 32) return;
        form = kv_append::form(a.append, row, a.append.bytes > 0);
        rows = a.append.out, to = row, more = a.append.ring;
        also = WHOLE ? a.append.write_to[row] : kv_append::place(a.append, row);
        const bf16* from = static_cast<const bf16*>(a.append.kv) + row * a.append.kv_stride;
#pragma unroll
        for (int it = 0; it < ITER; ++it)
            kv_store::load_channels<WHOLE>(from, made.v[it], kv_store::channel(it), form.n, form.wide);
    } else {
        const compress::Arguments& c = a.compressions[part == KEYS];
        to = compress::pool_entry<W, bf16, WHOLE>(c, row, a.groups[part == KEYS], shared);
        if (to < 0 || threadIdx.x >= 32) return;
        form = compress::form(c, shared, part == KEYS, c.bytes > 0);
        rows = c.pool;
#pragma unroll
        for (int it = 0; it < ITER; ++it)
            kv_store::load_channels<WHOLE>(shared, made.v[it], kv_store::channel(it), form.n, form.wide);
    }
    kv_store::make<bf16, WHOLE>(made, form);
#pragma unroll 1
    for (; to >= 0; to = also, rows = more, also = -1) kv_store::put<bf16, WHOLE>(made, form, rows, to);
}

}  // namespace dsv4::attn_inputs
