// LINEAR: projections of up to eight tokens. A block has tiles of one input; its warps take (tile, slice) units in turn,
// their sums meet in shared memory and are added up in the order of slices, as in linear_few.cuh, and so are the bits.
// While blocks wait for each other and nobody knows the tokens yet, a warp unpacks the first weights of its first unit.
#pragma once
#include <dsv4/linear.cuh>
#include <dsv4/rms_norm.cuh>
#include <dsv4/persistent/meeting.cuh>
#include <dsv4/persistent/stream.cuh>

namespace dsv4::persistent {

constexpr int MOST_PARTS = 16;
constexpr int EARLY_BLOCKS = 3;  // are unpacked early, of a chunk's four: as many as there are registers for

static_assert(CHUNK == linear::CHUNK, "slice_product takes a ring's stages");

struct Linear {
    linear::Part parts[MOST_PARTS];
    const float* norm;  // [K] weights of a norm that comes first; or null
    float eps;
    int count, tokens, columns, blocks, slices;  // of parts; ..; K; K/64; K/512
    int per_token, per_slice;                    // 2^16 / tokens and / slices, and one: they divide what is far below 2^16
    int norm_at;                                 // of the work area: where the norm's weights wait
    uint16_t cuts[MAX_BLOCKS + 1];               // block b has the tiles cuts[b] .. cuts[b + 1]
    mhc::Peers peers;                            // whom the result is told instead of being written; size 0: nobody
};

// A warp's units: a tile of the block, the part it belongs to, and a slice. Every WARPS-th is its own.
struct LinearUnit {
    int tile, slice, part, end;       // end: the tile behind the block's last one of the part
    int slices, tiles_on, slices_on;  // of a tile; to the next unit

    // first, tiles: the block's first tile, and how many it has.
    __device__ __forceinline__ LinearUnit(const Linear& a, int first, int tiles, int part)
        : part(part - 1), end(0), slices(a.slices), tiles_on(WARPS * a.per_slice >> 16), slices_on(WARPS - tiles_on * slices) {
        const int warp = threadIdx.x / 32;
        tile = warp * a.per_slice >> 16, slice = warp - tile * slices;
        if (tile < tiles) find_part(a, first, tiles);
    }
    __device__ __forceinline__ void find_part(const Linear& a, int first, int tiles) {
        do end = ++part + 1 < a.count ? min(a.parts[part + 1].first_tile - first, tiles) : tiles;
        while (tile >= end);
    }
    // Whether the part is another one, which is to be found, or there is no more.
    __device__ __forceinline__ bool advance() {
        slice += slices_on, tile += tiles_on;
        asm("{.reg .pred over; setp.ge.s32 over, %0, %2; @over sub.s32 %0, %0, %2; @over add.s32 %1, %1, 1;}"
            : "+r"(slice), "+r"(tile)
            : "r"(slices));
        return tile >= end;
    }
    static __device__ __forceinline__ int blocks(int slice, int all) {
        return min(all - slice * linear::SLICE_BLOCKS, linear::SLICE_BLOCKS);
    }
};

// What is known before the tokens are: the part of the block's first tile, and the first blocks of the warp's first unit,
// unpacked, if that is a whole slice of NVFP4.
struct Ahead {
    bool ready;
    int own;
    uint32_t a[EARLY_BLOCKS][1][4][4];
};

// Every thread calls, after come() behind the phase in front: the norm's weights are on their way.
__device__ __forceinline__ void linear_ahead(int turn) {
    const Linear& a = payload<Linear>(turn);
    const int at = threadIdx.x * 16;
    number_rows(a.peers, a.tokens);
    if (a.norm == nullptr) return;
    for (int i = at; i < a.columns * 4; i += THREADS * 16)
        start_copy16(shared_address(memory()) + WORK_AT + a.norm_at + i, reinterpret_cast<const uint8_t*>(a.norm) + i);
}

__device__ __forceinline__ void prepare_linear(int turn, const Stream& stream, Ahead& ahead) {
    const Linear& a = payload<Linear>(turn);
    const int first = a.cuts[blockIdx.x], tiles = a.cuts[blockIdx.x + 1] - first;
    ahead.ready = false, ahead.own = 0;
    while (ahead.own + 1 < a.count && first >= a.parts[ahead.own + 1].first_tile) ++ahead.own;
    const LinearUnit unit(a, first, tiles, ahead.own);
    if (unit.tile >= tiles) return;
    ahead.ready = a.parts[unit.part].format == linear::NVFP4 && unit.blocks(unit.slice, a.blocks) == linear::SLICE_BLOCKS;
    if (!ahead.ready) return;
    const int lane = threadIdx.x % 32;
    stream.wait();
    const uint8_t *const codes = stream.byte(lane * 16), *const scales = stream.byte(lane * 2 + w4::CODE_BYTES);
#pragma unroll
    for (int k = 0; k < EARLY_BLOCKS; ++k)
        linear::nvfp4_operands(ahead.a[k][0], codes + k * w4::BLOCK_BYTES, scales + k * w4::BLOCK_BYTES);
}

// sum += the first blocks of the unit that `ahead` has begun.
__device__ __forceinline__ void begin_unit(float (&sum)[1][4], const Ahead& ahead, const uint8_t* x) {
#pragma unroll
    for (int k = 0; k < EARLY_BLOCKS; ++k) linear::block_product<linear::NVFP4>(sum, ahead.a[k], x + k * 128);
}

// A warp's slice of a token, normed as norm_row does it and staged: there are no more slices of tokens than warps.
// shares [tokens][2 slices]: a row's sums of squares, by 256 columns.
__device__ __forceinline__ void stage_normed(const Linear& a, const linear::Part& part, uint8_t* x, int stride, float* undo,
                                             float* shares) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int token = warp * a.per_slice >> 16, slice = warp - token * a.slices;
    const int column = slice * SLICE + lane * 16;
    const bool mine = token < a.tokens;
    uint32_t pairs[8] = {};
    if (mine) load_columns(pairs, part.x + token * part.x_stride + column, column < a.columns);
    const auto values = [&](float (&v)[16]) {
#pragma unroll
        for (int i = 0; i < 16; ++i) v[i] = __uint_as_float(i % 2 ? pairs[i / 2] & 0xFFFF0000u : pairs[i / 2] << 16);
    };
    float v[16];
    values(v);
    const float share = norm_share(v);
    shares += token * 2 * a.slices;
    if (mine && lane % 16 == 0) shares[2 * slice + lane / 16] = share;
    wait_for_copies();
    __syncthreads();
    if (!mine) return;
    const float scale = norm_scale(shares, 2 * a.slices, a.columns, a.eps);
    for (uint32_t& pair : pairs) asm volatile("" : "+r"(pair));  // else the sixteen values would be kept until here
    values(v);
    const float4* weights = reinterpret_cast<const float4*>(memory() + WORK_AT + a.norm_at + column * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float4 w = column < a.columns ? weights[i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        pairs[2 * i] = bf16x2(normed(v[4 * i], scale, w.x), normed(v[4 * i + 1], scale, w.y));
        pairs[2 * i + 1] = bf16x2(normed(v[4 * i + 2], scale, w.z), normed(v[4 * i + 3], scale, w.w));
    }
    const float back = part.format == linear::PLAIN ? 1.0f : scale_to_f16(pairs);
    uint4* to = reinterpret_cast<uint4*>(x + token * stride + slice * 1024 + lane * 32);
    to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
    if (lane == 0) undo[slice * TOKENS + token] = back;
}

// Work area: x [tokens][slices] | undo [slices][8] | slots [tile][slice][tokens][16] | the norm's weights.
__device__ __forceinline__ void linear_phase(int turn, Stream& stream, const Ahead& ahead) {
    const Linear& a = payload<Linear>(turn);
    const int first = a.cuts[blockIdx.x], tiles = a.cuts[blockIdx.x + 1] - first;
    if (tiles == 0) return;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int stride = a.slices * 1024 + 16, tokens = a.tokens, step = tokens * linear::TILE_ROWS;
    uint8_t* const x = memory() + WORK_AT;
    float* const undo = reinterpret_cast<float*>(x + tokens * stride);
    float* const slots = undo + a.slices * TOKENS;
    int own = ahead.own;
    if (a.norm != nullptr)
        stage_normed(a, a.parts[own], x, stride, undo, slots);
    else
        linear::stage_slices<WARPS, true>(a.parts[own], tokens, a.columns, 0, a.slices, a.per_slice, x, stride, undo);
    const uint8_t* const mine = x + linear::lane_columns(tokens, stride);
    __syncthreads();

    LinearUnit unit(a, first, tiles, own);
    if (unit.tile < tiles) {
        const int blocks = a.blocks;
        float* slot = slots + threadIdx.x / 32 * step + 2 * t * linear::TILE_ROWS + g;
        float sum[1][4] = {};
        int back = static_cast<int>(reinterpret_cast<uint8_t*>(undo + 2 * t) - memory());
        asm volatile("" : "+r"(back));  // else its sum with what comes in front would be made in two steps, each time
        int begun = 0, format = a.parts[unit.part].format;
        float scale = linear::undo_of(format);
        if (ahead.ready) begin_unit(sum, ahead, mine + unit.slice * 1024), begun = EARLY_BLOCKS;
        int least = linear::least_of(format, begun);
        const auto which = [&] {
            int number = unit.slice, tile = unit.tile, place = unit.part;
            asm volatile("" : "+r"(number), "+r"(tile), "+r"(place));  // else what follows would be computed for every format
            const linear::Part& part = a.parts[place];
            return linear::Slice{part, number, unit.blocks(number, blocks), first + tile - part.first_tile};
        };
#pragma unroll 1
        while (true) {
            linear::slice_product(
                sum, format, 1, unit.blocks(unit.slice, blocks), mine + unit.slice * 1024, lane, stream, which,
                [](Stream& s) { return s.replace(); },
                [](Stream& s) {
                    s.release();
                    s.fill();
                },
                begun, least);
            linear::undo_scaling(sum, scale, reinterpret_cast<const float*>(memory() + (back + unit.slice * TOKENS * 4)));
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (2 * t + i % 2 < tokens) slot[i % 2 * linear::TILE_ROWS + i / 2 * 8] = sum[0][i];
            asm volatile("mov.b64 {%0, %1}, 0; mov.b64 {%2, %3}, 0;"
                         : "=f"(sum[0][0]), "=f"(sum[0][1]), "=f"(sum[0][2]), "=f"(sum[0][3]));
            slot += WARPS * step;
            if (!unit.advance()) continue;
            if (unit.tile >= tiles) break;
            unit.find_part(a, first, tiles);
            format = a.parts[unit.part].format, scale = linear::undo_of(format), least = linear::least_of(format, 0);
        }
    }
    __syncthreads();

    for (int i = threadIdx.x; i < tiles * step; i += THREADS) {
        const int row = i % linear::TILE_ROWS, pair = i / linear::TILE_ROWS;
        const int at = pair * a.per_token >> 16, token = pair - at * tokens;
        const float* slot = slots + at * a.slices * step + token * linear::TILE_ROWS + row;
        while (own + 1 < a.count && first + at >= a.parts[own + 1].first_tile) ++own;
        float y = 0.0f;
#pragma unroll 8
        for (int k = 0; k < a.slices; ++k) y += slot[k * step];
        const linear::Part& part = a.parts[own];
        const int column = (first + at - part.first_tile) * linear::TILE_ROWS + row;
        if (a.peers.size == 0) linear::put(part, column, token, y);
        else if (column < part.rows) a.peers.tell_all(token, column, y * part.alpha, position().numbers[token]);
    }
}

// cuts [grid + 1]. norm [K], if there is one: x is normed first. joined: the next phase is one that needs nothing of this.
// K is a multiple of 16, and x can be read 16 bytes at a time. size > 0: the ranks, of mhc_seam, whom the one part's result
// is told; the next phase is that seam.
static cudaError_t describe_linear(Phase* phase, const linear::Part* parts, int count, const uint16_t* cuts, int grid,
                                   int tokens, int columns, const float* norm, float eps, int joined,
                                   uint64_t* const* inboxes, uint32_t* turns, int rank, int size) {
    if (size < 0 || size > mhc::MOST_RANKS || (size > 0 && (count > 1 || parts->row_scale != nullptr))) return cudaErrorInvalidValue;
    if (count < 1 || count > MOST_PARTS || grid > MAX_BLOCKS || tokens < 1 || tokens > TOKENS) return cudaErrorInvalidValue;
    Linear a = {};
    for (int i = 0; i < count; ++i) a.parts[i] = parts[i];
    for (int b = 0; b <= grid; ++b) a.cuts[b] = cuts[b];
    a.count = count, a.tokens = tokens, a.columns = columns;
    a.blocks = (columns + linear::BLOCK_COLUMNS - 1) / linear::BLOCK_COLUMNS;
    a.slices = (a.blocks + linear::SLICE_BLOCKS - 1) / linear::SLICE_BLOCKS;
    if (a.slices < 1 || a.slices > WARPS || columns % 16) return cudaErrorInvalidValue;
    for (int i = 0; i < count; ++i)
        if (!parts[i].x_wide) return cudaErrorInvalidValue;
    a.per_token = (1 << 16) / tokens + 1, a.per_slice = (1 << 16) / a.slices + 1;
    a.norm = norm, a.eps = eps;
    if (norm != nullptr && (tokens * a.slices > WARPS || columns > 4096 || !aligned16(norm))) return cudaErrorInvalidValue;
    int most = 0;
    for (int b = 0; b < grid; ++b) most = max(most, cuts[b + 1] - cuts[b]);
    a.norm_at = tokens * (a.slices * 1024 + 16) + a.slices * TOKENS * 4 + most * a.slices * tokens * 64;
    a.peers = mhc::peers_of(inboxes, turns, nullptr, 0, rank, size);
    fill_phase(phase, LINEAR, a);
    phase->joined = joined || size > 0 ? NEXT : 0;
    return cudaSuccess;
}

}  // namespace dsv4::persistent
