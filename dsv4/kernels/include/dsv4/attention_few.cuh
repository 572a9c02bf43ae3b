// Attention of a decode step: HG heads of a token by eight blocks, here a cluster; tile n belongs to block n % 8.
//
// What a step waits for is a chain: row numbers, entries, products, softmax, products, the other blocks. So each warp
// reads the row numbers itself and copies its entries to registers without a barrier; queries are normed while they
// come. Decoded once to BF16 in shared memory, entries serve as keys (q . entry) and as values (p . entries). A block
// walks its tiles in stages of TILES with an online softmax, whose running maximum moves once per stage; the entries of
// the next stage are on their way meanwhile. The blocks' results meet in distributed shared memory in rank order.
//
// Neither order nor stages depend on the widths of the row lists, on HG, on the other rows or on how many of them there
// are: a row's bits are the same in every such call.
#pragma once
#include <dsv4/attention.cuh>
#include <dsv4/cluster.cuh>
#include <dsv4/mma.cuh>

namespace dsv4::attention::few {

constexpr int SPLITS = 8, WARPS = 16, THREADS = WARPS * 32;
static_assert(WARPS == TILE, "a warp takes an entry of each tile");
constexpr int OUT_ROW = DH + 8;  // floats between rows of a partial result
constexpr float LOG2E = 1.4426950408889634f;

template <int HG, int TILES, int QUARTERS = HG == 64 ? 2 : 4>
struct Shared {
    static constexpr int STAGE = TILES * TILE, SCORE_ROW = STAGE + 4;  // floats; probabilities take their place as BF16
    static constexpr int PARTS = QUARTERS;                             // partial dot products, by part of the channels
    alignas(16) uint8_t entries[STAGE * ROW];                          // this and q become the partial result
    alignas(16) uint8_t q[HG * ROW];
    alignas(16) float scores[PARTS][HG][SCORE_ROW];
    alignas(8) float seen[HG][2];  // largest logit x log2(e), and the sum of probabilities relative to it
    float fade[HG];
    int last[WARPS];
};

// Floats as integers of the same order; its own inverse.
__device__ __forceinline__ int ordered(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
__device__ __forceinline__ float warp_max(float x) {
    return __int_as_float(ordered(__reduce_max_sync(ALL, ordered(__float_as_int(x)))));
}

// An entry's bytes as a warp holds them: 8 codes of chunk l, of chunk 32 + l or half a chunk of the tail, and scales or
// the tail's other half.
struct Bytes {
    uint2 low, high, rest;

    static __device__ __forceinline__ Bytes of(const uint8_t* entry, int lane) {
        const bool codes = lane < (kv::PLAIN - 256) / 8;
        const int high = codes ? 256 + 8 * lane : kv::PLAIN + 16 * (lane - (kv::PLAIN - 256) / 8);
        const int rest = codes ? kv::SCALES : high + 8;
        return {*reinterpret_cast<const uint2*>(entry + 8 * lane), *reinterpret_cast<const uint2*>(entry + high),
                *reinterpret_cast<const uint2*>(entry + rest)};
    }

    // What lane 0 has of the scales.
    __device__ __forceinline__ uint32_t first_scales() const { return __shfl_sync(ALL, rest.x, 0); }

    // BF16 to row `to`.
    __device__ __forceinline__ void put(uint8_t* to, uint32_t first_scales, int lane) const {
        const bool codes = lane < (kv::PLAIN - 256) / 8;
        uint4 out[2];
        const int shift = lane / 8 * 8;
        kv::e4m3x16_to_bf16(out, low, high, first_scales >> shift & 255, codes ? rest.y >> shift & 255 : 0);
        uint4* at = reinterpret_cast<uint4*>(to) + lane;
        at[0] = out[0], at[32] = codes ? out[1] : make_uint4(high.x, high.y, rest.x, rest.y);
    }
};

__device__ __forceinline__ void put_zeros(uint8_t* to, int lane) {
    uint4* at = reinterpret_cast<uint4*>(to) + lane;
    at[0] = at[32] = make_uint4(0, 0, 0, 0);
}

// What the blocks have of some channels of a head, added up in rank order and divided by the sum of probabilities.
// seen: each block's largest logit and its sum. The sink is a logit x log2(e).
template <int WIDTH>
__device__ __forceinline__ void merge(float (&out)[WIDTH], const float (&parts)[SPLITS][WIDTH],
                                      const float2 (&seen)[SPLITS], float sink) {
    float top = LOWEST, total = 0.0f, sum[WIDTH] = {};
#pragma unroll
    for (int r = 0; r < SPLITS; ++r) top = fmaxf(top, seen[r].x);
#pragma unroll
    for (int r = 0; r < SPLITS; ++r) {
        const float weight = exp2f(seen[r].x - top);
        total = fmaf(seen[r].y, weight, total);
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) sum[k] = fmaf(parts[r][k], weight, sum[k]);
    }
    total += exp2f(sink - top);
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) out[k] = sum[k] / total;
}

// One token's tiles of one block. Heads are the rows of the products, but eight heads their columns: sums is then what
// it is otherwise, transposed.
template <int HG, int TILES, typename S = Shared<HG, TILES>>
struct Block {
    static constexpr int STAGE = S::STAGE, MT = (HG + 15) / 16, WORDS = (STAGE + 31) / 32;
    static constexpr bool AHEAD = HG < 32;  // are there registers for a stage that comes while another is worked on?

    const Arguments& a;
    S& s;
    const int64_t token;
    const int rank, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Source local, pool;  // rows: of this token
    const int local_positions;
    int rows[WORDS];                                    // of the stage to be fetched next: slots l, 32 + l, ..
    unsigned there[WORDS];                              // slots of the stage at hand that hold an entry
    Bytes bytes[TILES];
    float sums[MT][HG == 8 ? 2 : 4][4];  // of the warp's 32 channels

    __device__ Block(const Arguments& a, S& s, int64_t token, int rank)
        : a(a), s(s), token(token), rank(rank), local(of_token(a.local, token)), pool(of_token(a.pool, token)),
          local_positions(a.local_positions) {}
    static __device__ Source of_token(Source all, int64_t token) {
        all.rows += token * all.row_stride;
        return all;
    }

    __device__ int first_position(int stage, int tile) const { return ((stage * TILES + tile) * SPLITS + rank) * TILE; }

    // The row number at a slot 0 .. STAGE-1 of a stage, or one of a later stage; -1 for none.
    __device__ int row_at(int stage, int slot) const {
        const int position = first_position(stage, slot / TILE) + slot % TILE, selected = position - local_positions;
        const bool in_window = selected < 0;
        const int64_t* from = in_window ? local.rows + position : pool.rows + selected;
        return (in_window ? position - local.width : selected - pool.width) < 0 ? static_cast<int>(*from) : -1;
    }

    __device__ void read_rows(int stage) {
#pragma unroll
        for (int c = 0; c < WORDS; ++c) {
            const int slot = c * 32 + lane;
            rows[c] = STAGE % 32 == 0 || slot < STAGE ? row_at(stage, slot) : -1;
        }
    }

    // Slots up to the end of the lists, in whole stages.
    __device__ int all_slots() const {
        const int tiles = (local_positions + pool.width + TILE - 1) / TILE - rank;
        return ((tiles + SPLITS - 1) / SPLITS + TILES - 1) / TILES * STAGE;
    }

    // The last slot behind stage 0 that holds an entry, among those that this thread looks at.
    __device__ int scan(int slots) const {
        int last = 0;
#pragma unroll 4
        for (int i = STAGE + threadIdx.x; i < slots; i += THREADS)
            if (row_at(0, i) >= 0) last = i;
        return __reduce_max_sync(ALL, last);
    }

    // The row number of the warp's entry in a tile of that stage.
    __device__ int my_row(int tile) const { return __shfl_sync(ALL, rows[tile / 2], tile % 2 * TILE + warp); }
    __device__ Source source(int stage, int tile) const {
        return first_position(stage, tile) < local_positions ? local : pool;
    }

    // Starts to read the warp's packed entries in some tiles of the stage whose rows have been read.
    template <int FROM = 0, int TO = TILES>
    __device__ void fetch(int stage) {
#pragma unroll
        for (int j = FROM; j < TO; ++j) {
            const int row = my_row(j);
            const Source from = source(stage, j);
            bytes[j] = {};  // nothing of an earlier stage is kept
            if (row < 0 || !from.packed) continue;
            bytes[j] = Bytes::of(from.data + static_cast<int64_t>(row) * kv::ENTRY_BYTES, lane);
        }
    }

    // The same as a hint to the L2 cache, where registers are few.
    __device__ void announce(int stage) const {
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            const int row = my_row(j);
            const Source from = source(stage, j);
            if (row >= 0 && from.packed && lane * 128 < kv::ENTRY_BYTES)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(from.data + static_cast<int64_t>(row) * kv::ENTRY_BYTES +
                                                               lane * 128));
        }
    }

    // Tiles of the stage at hand up to the last one with an entry.
    __device__ int used_tiles() const {
        int used = 0;
#pragma unroll
        for (int c = 0; c < WORDS; ++c)
            if (there[c]) used = (c * 32 + 31 - __clz(there[c])) / TILE + 1;
        return used;
    }

    // BF16 entries of these tiles up to the last used one, zeros where there is none: 0 x NaN must not reach a sum.
    template <int FROM = 0, int TO = TILES>
    __device__ void decode(int stage) {
#pragma unroll
        for (int c = 0; c < WORDS; ++c) there[c] = __ballot_sync(ALL, rows[c] >= 0);
        const int used = used_tiles();
#pragma unroll
        for (int j = FROM; j < TO; ++j) {
            if (j >= used) break;
            if (!source(stage, j).packed) continue;
            uint8_t* to = s.entries + (j * TILE + warp) * ROW;
            if (there[j / 2] >> (j % 2 * TILE + warp) & 1) bytes[j].put(to, bytes[j].first_scales(), lane);
            else put_zeros(to, lane);
        }
    }

    // The stage's entries that are BF16 already.
    __device__ void copy_plain(int stage) {
        if (local.packed && pool.packed) return;
        const int used = used_tiles();
#pragma unroll 1
        for (int tile = 0; tile < used; ++tile) {
            const Source from = source(stage, tile);
            if (from.packed) continue;
            const int row = row_at(stage, tile * TILE + warp);
            uint4* to = reinterpret_cast<uint4*>(s.entries + (tile * TILE + warp) * ROW) + lane;
            const uint8_t* entry = from.data + static_cast<int64_t>(row) * (DH * 2) + 16 * lane;
            if (row < 0) {
                to[0] = to[32] = make_uint4(0, 0, 0, 0);
            } else {
                copy_async16(to, entry);
                copy_async16(to + 32, entry + DH);
            }
        }
        copies_wait();
    }

    // dot[i] = 16 heads x 8 entries of tile first + STEP i, over the channels of one quarter.
    template <int COUNT, int STEP>
    __device__ void dots(float (&dot)[COUNT][4], int quarter, int mt, int half, int first, int used) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) dot[i][0] = dot[i][1] = dot[i][2] = dot[i][3] = 0.0f;
        const uint8_t* heads = s.q + (mt * 16 + lane % 16) * ROW + lane / 16 * 16 + quarter * (DH / 2);
        const uint8_t* keys = s.entries + (first * TILE + half * 8 + lane % 8) * ROW + lane / 8 * 16 + quarter * (DH / 2);
#pragma unroll
        for (int k = 0; k < DH / 2; k += 64) {  // bytes: two products of 16 channels
            uint32_t a0[4], a1[4];
            load_matrices(a0, heads + k);
            load_matrices(a1, heads + k + 32);
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                if (first + STEP * i < used) {
                    uint32_t b[4];
                    load_matrices(b, keys + STEP * i * (TILE * ROW) + k);
                    mma_bf16(dot[i], a0, b[0], b[1]);
                    mma_bf16(dot[i], a1, b[2], b[3]);
                }
        }
    }

    // dot[i] = 16 entries of tile first + STEP i x 8 heads, over the channels of one quarter. A tile's operands are all
    // asked for first: its products wait for each other.
    template <int COUNT, int STEP>
    __device__ void dots_of_eight(float (&dot)[COUNT][4], int quarter, int first, int used) const {
        constexpr int STEPS = DH / 2 / 64;  // two products of 16 channels each
        const uint8_t* heads = s.q + lane % 8 * ROW + lane / 8 * 16 + quarter * (DH / 2);
        const uint8_t* keys = s.entries + (first * TILE + lane % 16) * ROW + lane / 16 * 16 + quarter * (DH / 2);
        uint32_t b[STEPS][4];
#pragma unroll
        for (int k = 0; k < STEPS; ++k) load_matrices(b[k], heads + k * 64);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            dot[i][0] = dot[i][1] = dot[i][2] = dot[i][3] = 0.0f;
            if (first + STEP * i >= used) continue;
            uint32_t a[2 * STEPS][4];
#pragma unroll
            for (int k = 0; k < 2 * STEPS; ++k) load_matrices(a[k], keys + STEP * i * (TILE * ROW) + k * 32);
#pragma unroll
            for (int k = 0; k < STEPS; ++k) {
                mma_bf16(dot[i], a[2 * k], b[k][0], b[k][1]);
                mma_bf16(dot[i], a[2 * k + 1], b[k][2], b[k][3]);
            }
        }
    }

    template <int COUNT, int STEP>
    __device__ void put_dots_of_eight(const float (&dot)[COUNT][4], int part, int first, int used) {
        const int g = lane / 4, head = lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (const int tile = first + STEP * i; tile < used) {
#pragma unroll
                for (int j = 0; j < 4; ++j) s.scores[part][head + j % 2][tile * 16 + j / 2 * 8 + g] = dot[i][j];
            }
    }

    // Those in their place; ADD: on top of what this thread has put there.
    template <bool ADD, int COUNT, int STEP>
    __device__ void put_dots(float (&dot)[COUNT][4], int part, int mt, int half, int first, int used) {
        const int g = lane / 4, column = half * 8 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (const int tile = first + STEP * i; tile < used) {
#pragma unroll
                for (int lower = 0; lower < 2; ++lower) {
                    float* at = &s.scores[part][mt * 16 + g + 8 * lower][tile * 16 + column];
                    float2 sum = make_float2(dot[i][2 * lower], dot[i][2 * lower + 1]);
                    if (ADD) {
                        const float2 there = *reinterpret_cast<const float2*>(at);
                        sum.x += there.x, sum.y += there.y;
                    }
                    *reinterpret_cast<float2*>(at) = sum;
                }
            }
    }

    // q . entry, summed by quarters of the channels: (0 + 1) + (2 + 3). Groups of warps share the tiles, the heads
    // or the quarters.
    __device__ void score(int used) {
        const int four = warp % 4, half = warp / 4 % 2, two = warp / 8;
        if constexpr (HG == 8) {
            float dot[(TILES + 3) / 4][4];
            dots_of_eight<(TILES + 3) / 4, 4>(dot, four, warp / 4, used);
            put_dots_of_eight<(TILES + 3) / 4, 4>(dot, four, warp / 4, used);
        } else if constexpr (HG == 16 && S::PARTS == 2) {
            const int part = warp % 2, other = warp / 2 % 2, first = warp / 4;
            float dot[(TILES + 3) / 4][4];
            dots<(TILES + 3) / 4, 4>(dot, 2 * part, 0, other, first, used);
            put_dots<false, (TILES + 3) / 4, 4>(dot, part, 0, other, first, used);
            dots<(TILES + 3) / 4, 4>(dot, 2 * part + 1, 0, other, first, used);
            put_dots<true, (TILES + 3) / 4, 4>(dot, part, 0, other, first, used);
        } else if constexpr (HG == 16) {
            float dot[(TILES + 1) / 2][4];
            dots<(TILES + 1) / 2, 2>(dot, four, 0, half, two, used);
            put_dots<false, (TILES + 1) / 2, 2>(dot, four, 0, half, two, used);
        } else if constexpr (HG == 32) {
            float dot[TILES][4];
            dots<TILES, 1>(dot, four, two, half, 0, used);
            put_dots<false, TILES, 1>(dot, four, two, half, 0, used);
        } else {
            static_assert(HG == 64, "four warps of 16 heads");
            float dot[TILES][4];
            dots<TILES, 1>(dot, 2 * two, four, half, 0, used);
            put_dots<false, TILES, 1>(dot, two, four, half, 0, used);
            dots<TILES, 1>(dot, 2 * two + 1, four, half, 0, used);
            put_dots<true, TILES, 1>(dot, two, four, half, 0, used);
        }
    }

    __device__ float score_of(int head, int slot) const {
        if constexpr (S::PARTS == 2) return s.scores[0][head][slot] + s.scores[1][head][slot];
        return (s.scores[0][head][slot] + s.scores[1][head][slot]) +
               (s.scores[2 % S::PARTS][head][slot] + s.scores[3 % S::PARTS][head][slot]);
    }

    // Probabilities relative to the running maximum, rounded to BF16 over their scores; a warp per head.
    __device__ void softmax(int used) {
        const float scale = a.scale * LOG2E;
#pragma unroll
        for (int i = 0; i < (HG + WARPS - 1) / WARPS; ++i) {
            const int head = i * WARPS + warp;
            if (HG < WARPS && head >= HG) break;
            float x[WORDS], sum = 0.0f;
            const float before = s.seen[head][0];
            float top = before;
#pragma unroll
            for (int c = 0; c < WORDS; ++c) {
                x[c] = there[c] >> lane & 1 ? __fmul_rn(score_of(head, c * 32 + lane), scale) : -INFINITY;
                top = fmaxf(top, x[c]);
            }
            top = warp_max(top);
            __syncwarp();  // scores have been read
            bf16* p = reinterpret_cast<bf16*>(s.scores[0][head]);
#pragma unroll
            for (int c = 0; c < WORDS; ++c) {
                const int slot = c * 32 + lane;
                const float probability = exp2f(x[c] - top);
                sum += probability;
                if (slot < used * TILE) p[slot].bits = static_cast<uint16_t>(bf16x2(probability, 0.0f));
            }
            sum = warp_sum(sum);
            if (lane == 0) {
                const float fade = exp2f(before - top);
                s.seen[head][1] = fmaf(s.seen[head][1], fade, sum);
                s.seen[head][0] = top, s.fade[head] = fade;
            }
        }
    }

    // sums = sums * fade + p . entries
    __device__ void accumulate_of_eight(int used) {
        const float2 fade = *reinterpret_cast<const float2*>(s.fade + lane % 4 * 2);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[0][n][j] *= j % 2 ? fade.y : fade.x;
        const uint8_t* values = s.entries + (lane % 8 + lane / 16 * 8) * ROW + warp * 64 + lane / 8 % 2 * 16;
        const uint32_t* p = reinterpret_cast<const uint32_t*>(s.scores[0][lane / 4]) + lane % 4;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            if (tile >= used) break;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                uint32_t v[4];
                load_transposed(v, values + tile * (TILE * ROW) + n * 32);
                mma_bf16(sums[0][n], v, p[tile * 8], p[tile * 8 + 4]);
            }
        }
    }

    __device__ void accumulate(int used) {
        if constexpr (HG == 8) return accumulate_of_eight(used);
        const int g = lane / 4;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            const float upper = s.fade[mt * 16 + g], lower = s.fade[mt * 16 + g + 8];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                sums[mt][n][0] *= upper, sums[mt][n][1] *= upper;
                sums[mt][n][2] *= lower, sums[mt][n][3] *= lower;
            }
        }
        const uint8_t* values = s.entries + lane % 16 * ROW + warp * 64 + lane / 16 * 16;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            if (tile >= used) break;
            uint32_t b[2][4];
            load_transposed(b[0], values + tile * (TILE * ROW));
            load_transposed(b[1], values + tile * (TILE * ROW) + 32);
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
                uint32_t p[4];
                load_matrices(p, reinterpret_cast<const uint8_t*>(s.scores[0][mt * 16 + lane % 16]) + tile * 32 +
                                     lane / 16 * 16);
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    mma_bf16(sums[mt][2 * n], p, b[n][0], b[n][1]);
                    mma_bf16(sums[mt][2 * n + 1], p, b[n][2], b[n][3]);
                }
            }
        }
    }

    // Entries of stage 0, and the queries of this block while those come.
    __device__ void take_queries(int head) {
        constexpr int AT_ONCE = HG < 32 ? 1 : 2;
        float2 turns[4];
        Query q[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (HG >= WARPS || warp < HG) load_query(q[i], a, token, head + i * WARPS + warp, lane);
        if (a.turn != nullptr) load_turns(turns, a, token, lane);
        fetch(0);
#pragma unroll 1
        for (int first = warp; first < HG; first += AT_ONCE * WARPS) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                if (first != warp) load_query(q[i], a, token, head + first + i * WARPS, lane);
                if (a.turn != nullptr) norm_rope(q[i], turns, a, lane);
                put_query(s.q + (first + i * WARPS) * ROW, q[i], lane);
            }
        }
    }

    __device__ void run(int head) {
        const int slots = all_slots();
        read_rows(0);
        take_queries(head);
        const int last = slots > STAGE ? scan(slots) : 0;
        if (lane == 0) s.last[warp] = last;
        if (threadIdx.x < HG) s.seen[threadIdx.x][0] = LOWEST, s.seen[threadIdx.x][1] = 0.0f;
        decode(0);
        copy_plain(0);
        if (slots > STAGE) read_rows(1);
        __syncthreads();
        const int stages = __reduce_max_sync(ALL, s.last[lane % WARPS]) / STAGE + 1;
        for (auto& rows : sums)
            for (auto& sum : rows) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
        for (int stage = 0; stage < stages; ++stage) {
            const bool more = stage + 1 < stages;
            const int used = used_tiles();
            if (more && AHEAD) fetch(stage + 1);
            if (more && !AHEAD) announce(stage + 1);
            if (used) {
                score(used);
                __syncthreads();
                softmax(used);
                __syncthreads();
                accumulate(used);
            }
            __syncthreads();  // entries are no longer read
            if (!more) break;
            if constexpr (AHEAD) {
                decode(stage + 1);
            } else {
                fetch<0, TILES / 2>(stage + 1), decode<0, TILES / 2>(stage + 1);
                fetch<TILES / 2>(stage + 1), decode<TILES / 2>(stage + 1);
            }
            copy_plain(stage + 1);
            read_rows(stage + 2);
            __syncthreads();
        }
    }

    // Each block of the cluster adds up the partial results of HG / 8 heads and writes them; a thread has the same
    // channels of every head.
    __device__ void combine(int head) {
        constexpr int MINE = HG / SPLITS, WIDTH = HG == 16 ? 2 : 4, COLUMNS = DH / WIDTH, HEADS_AT_ONCE = THREADS / COLUMNS;
        float* partial = reinterpret_cast<float*>(s.entries);
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                float* to = partial + (mt * 16 + g) * OUT_ROW + warp * 32 + n * 8 + 2 * t;
                *reinterpret_cast<float2*>(to) = make_float2(sums[mt][n][0], sums[mt][n][1]);
                *reinterpret_cast<float2*>(to + 8 * OUT_ROW) = make_float2(sums[mt][n][2], sums[mt][n][3]);
            }
        cluster_arrive();
        const int channel = threadIdx.x % COLUMNS * WIDTH, first = rank * MINE + threadIdx.x / COLUMNS;
        float2 back[WIDTH / 2];
        float sink[MINE / HEADS_AT_ONCE];
#pragma unroll
        for (int k = 0; k < WIDTH / 2; ++k) back[k] = turn_back(a, token, channel + 2 * k);
#pragma unroll
        for (int i = 0; i < MINE / HEADS_AT_ONCE; ++i) {
            const int row = head + first + i * HEADS_AT_ONCE;
            sink[i] = row < a.heads ? a.sink[row] * LOG2E : 0.0f;
        }
        cluster_wait();
#pragma unroll
        for (int i = 0; i < MINE / HEADS_AT_ONCE; ++i) {
            const int row = first + i * HEADS_AT_ONCE;
            float2 seen[SPLITS];
            float parts[SPLITS][WIDTH], merged[WIDTH];
#pragma unroll
            for (int r = 0; r < SPLITS; ++r) {
                const uint64_t both = peer_value(reinterpret_cast<const uint64_t*>(s.seen[row]), r);
                seen[r] = make_float2(__uint_as_float(static_cast<uint32_t>(both)),
                                      __uint_as_float(static_cast<uint32_t>(both >> 32)));
                const float* from = partial + row * OUT_ROW + channel;
                if constexpr (WIDTH == 4) {
                    const float4 v = peer_value4(from, r);
                    parts[r][0] = v.x, parts[r][1] = v.y, parts[r][2] = v.z, parts[r][3] = v.w;
                } else {
                    const uint64_t v = peer_value(reinterpret_cast<const uint64_t*>(from), r);
                    parts[r][0] = __uint_as_float(static_cast<uint32_t>(v));
                    parts[r][1] = __uint_as_float(static_cast<uint32_t>(v >> 32));
                }
            }
            if (i + 1 == MINE / HEADS_AT_ONCE) cluster_arrive();  // this thread has read all it wants of its peers
            merge(merged, parts, seen, sink[i]);
            if (head + row >= a.heads) continue;
            bf16* to = a.out + (token * a.heads + head + row) * DH + channel;
#pragma unroll
            for (int k = 0; k < WIDTH; k += 2)
                reinterpret_cast<uint32_t*>(to)[k / 2] =
                    result(merged[k], merged[k + 1], back[k / 2], channel + k >= DH - a.rope);
        }
        cluster_wait();  // nobody leaves while its shared memory is read
    }
};

}  // namespace dsv4::attention::few
