// Attention of up to 64 rows: what its forms share. A token's tiles are eight splits': tile n belongs to split n % 8.
//
// Entries are decoded once to BF16 in shared memory, where they serve as keys (q . entry) and as values (p . entries). A
// split's tiles are walked in stages of TILES with an online softmax, whose running maximum moves once per stage. Of a long
// row each split's stages are up to four chunks, each with a softmax of its own. What was found is added up chunk by chunk,
// in each the splits in their order. Who has which splits is the form's: a cluster of eight blocks one each
// (attention_cluster.cuh), a block some of them one after the other (attention_parts.cuh), or eight blocks of the launch
// of all layers (persistent/attention_phase.cuh).
//
// Neither order nor stages depend on the widths of the row lists, on HG, on the other rows or on how many of them there
// are: a row's bits are the same in every such call.
#pragma once
#include <dsv4/attention.cuh>
#include <dsv4/mma.cuh>

namespace dsv4::attention::few {

constexpr int SPLITS = 8, WARPS = 16, THREADS = WARPS * 32;
static_assert(WARPS == TILE, "a warp takes an entry of each tile");
constexpr int CHUNKS = 4;  // at most, of a split
constexpr float LOG2E = 1.4426950408889634f;

template <int HG, int TILES>
struct Shared {
    static constexpr int STAGE = TILES * TILE, SCORE_ROW = STAGE + 4;  // floats; probabilities take their place as BF16
    static constexpr int PARTS = 4;                                    // partial dot products, by part of the channels
    alignas(16) uint8_t entries[STAGE * ROW];
    alignas(16) uint8_t q[HG * ROW];
    alignas(16) float scores[PARTS][HG][SCORE_ROW];
    alignas(8) float seen[HG][2];  // largest logit x log2(e), and the sum of probabilities relative to it
    float fade[HG];
    int last[WARPS];
};

// Whether the lists have room for more than a stage of each split.
template <int TILES>
__host__ __device__ __forceinline__ bool longer(const Arguments& a) {
    return a.positions() > SPLITS * TILES * TILE;
}

// Stages of a chunk of a split that has so many: as few as make CHUNKS chunks of them.
__device__ __forceinline__ int chunk_of(int stages) { return (stages + CHUNKS - 1) / CHUNKS; }

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

// Where a split's entries are.
template <int TILES>
struct Lists {
    static constexpr int STAGE = TILES * TILE, WORDS = (STAGE + 31) / 32;

    Source local, pool;  // rows: of this token
    int local_positions, split;

    __device__ Lists(const Arguments& a, int64_t token, int split)
        : local(of_token(a.local, token)), pool(of_token(a.pool, token)), local_positions(a.local_positions),
          split(split) {}
    static __device__ Source of_token(Source all, int64_t token) {
        all.rows += token * all.row_stride;
        return all;
    }

    __device__ int first_position(int stage, int tile) const { return ((stage * TILES + tile) * SPLITS + split) * TILE; }
    __device__ Source source(int stage, int tile) const {
        return first_position(stage, tile) < local_positions ? local : pool;
    }

    // The row number at a slot 0 .. STAGE-1 of a stage, or one of a later stage; -1 for none.
    __device__ int row_at(int stage, int slot) const {
        const int position = first_position(stage, slot / TILE) + slot % TILE, selected = position - local_positions;
        const bool in_window = selected < 0;
        const int64_t* from = in_window ? local.rows + position : pool.rows + selected;
        return (in_window ? position - local.width : selected - pool.width) < 0 ? static_cast<int>(*from) : -1;
    }

    // Those of slots l, 32 + l, .. of a stage.
    __device__ void read(int (&rows)[WORDS], int stage, int lane) const {
#pragma unroll
        for (int c = 0; c < WORDS; ++c) {
            const int slot = c * 32 + lane;
            rows[c] = STAGE % 32 == 0 || slot < STAGE ? row_at(stage, slot) : -1;
        }
    }

    // Out of what read() has given: the row number of a warp's entry in a tile.
    static __device__ int of_warp(const int (&rows)[WORDS], int tile, int warp) {
        return __shfl_sync(ALL, rows[tile / 2], tile % 2 * TILE + warp);
    }
};

// A split's tiles, once they are in shared memory. Heads are the rows of the products, but eight heads their columns: sums
// is then what it is otherwise, transposed.
template <int HG, int TILES, typename S = Shared<HG, TILES>>
struct Block {
    static constexpr int STAGE = S::STAGE, MT = (HG + 15) / 16, WORDS = (STAGE + 31) / 32;

    const Arguments& a;
    S& s;
    const int64_t token;
    const int rank, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned there[WORDS];               // slots of the stage at hand that hold an entry
    float sums[MT][HG == 8 ? 2 : 4][4];  // of the warp's 32 channels

    __device__ Block(const Arguments& a, S& s, int64_t token, int rank) : a(a), s(s), token(token), rank(rank) {}

    // Before the first stage; ends without a barrier.
    __device__ void clear() {
        if (threadIdx.x < HG) s.seen[threadIdx.x][0] = LOWEST, s.seen[threadIdx.x][1] = 0.0f;
        for (auto& rows : sums)
            for (auto& sum : rows) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
    }

    // The stage at hand, out of its row numbers.
    __device__ void look(const int (&rows)[WORDS]) {
#pragma unroll
        for (int c = 0; c < WORDS; ++c) there[c] = __ballot_sync(ALL, rows[c] >= 0);
    }
    __device__ bool holds(int tile) const { return there[tile / 2] >> (tile % 2 * TILE + warp) & 1; }

    // Tiles of the stage at hand up to the last one with an entry.
    __device__ int used_tiles() const {
        int used = 0;
#pragma unroll
        for (int c = 0; c < WORDS; ++c)
            if (there[c]) used = (c * 32 + 31 - __clz(there[c])) / TILE + 1;
        return used;
    }

    // The warp's entry of a tile, or zeros where there is none: 0 x NaN must not reach a sum.
    __device__ void put(int tile, const Bytes& bytes) {
        uint8_t* to = s.entries + (tile * TILE + warp) * ROW;
        if (holds(tile)) bytes.put(to, bytes.first_scales(), lane);
        else put_zeros(to, lane);
    }

    // The stage's entries that are BF16 already.
    __device__ void copy_plain(const Lists<TILES>& lists, int stage) {
        if (lists.local.packed && lists.pool.packed) return;
        const int used = used_tiles();
#pragma unroll 1
        for (int tile = 0; tile < used; ++tile) {
            const Source from = lists.source(stage, tile);
            if (from.packed) continue;
            const int row = lists.row_at(stage, tile * TILE + warp);
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
        } else {
            static_assert(HG == 32, "two warps of 16 heads");
            float dot[TILES][4];
            dots<TILES, 1>(dot, four, two, half, 0, used);
            put_dots<false, TILES, 1>(dot, four, two, half, 0, used);
        }
    }

    __device__ float score_of(int head, int slot) const {
        if constexpr (S::PARTS == 2) return s.scores[0][head][slot] + s.scores[1][head][slot];
        return (s.scores[0][head][slot] + s.scores[1][head][slot]) +
               (s.scores[2 % S::PARTS][head][slot] + s.scores[3 % S::PARTS][head][slot]);
    }

    // Probabilities relative to the running maximum, rounded to BF16 over their scores; a warp per head. FIRST: of the first
    // stage, in front of which nothing has been seen.
    template <bool FIRST = false>
    __device__ void softmax(int used) {
        const float scale = a.scale * LOG2E;
#pragma unroll
        for (int i = 0; i < (HG + WARPS - 1) / WARPS; ++i) {
            const int head = i * WARPS + warp;
            if (HG < WARPS && head >= HG) break;
            float x[WORDS], sum = 0.0f;
            const float before = FIRST ? LOWEST : s.seen[head][0];
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
            if (FIRST) {
                if (lane == 0) s.seen[head][0] = top, s.seen[head][1] = sum;
            } else if (lane == 0) {
                const float fade = exp2f(before - top);
                s.seen[head][1] = fmaf(s.seen[head][1], fade, sum);
                s.seen[head][0] = top, s.fade[head] = fade;
            }
        }
    }

    // sums = sums * fade
    __device__ void fade_sums() {
        const int g = lane / 4;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            const float2 of_eight = *reinterpret_cast<const float2*>(s.fade + lane % 4 * 2);
            const float upper = s.fade[mt * 16 + g], lower = s.fade[mt * 16 + (HG == 8 ? 0 : 8) + g];
            for (auto& sum : sums[mt])
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    sum[j] *= HG == 8 ? (j % 2 ? of_eight.y : of_eight.x) : (j < 2 ? upper : lower);
        }
    }

    // sums += p . entries
    __device__ void accumulate_of_eight(int used) {
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

    // sums = sums * fade + p . entries. FIRST: sums is p . entries.
    template <bool FIRST = false>
    __device__ void accumulate(int used) {
        if constexpr (FIRST) {
            for (auto& rows : sums)
                for (auto& sum : rows) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
        } else {
            fade_sums();
        }
        if constexpr (HG == 8) return accumulate_of_eight(used);
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
};

}  // namespace dsv4::attention::few
