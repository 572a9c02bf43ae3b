// LINEAR: projections of up to eight tokens. A block has tiles of one input; its warps take (tile, slice) units in turn,
// their sums meet in shared memory and are added up in the order of slices, as in linear_few.cuh, and so are the bits.
// While blocks wait for each other and nobody knows the tokens yet, a warp looks up what it will do and where results go,
// and unpacks the first weights of its first unit.
#pragma once
#include <climits>
#include <dsv4/linear.cuh>
#include <dsv4/rms_norm.cuh>
#include <dsv4/persistent/meeting.cuh>
#include <dsv4/persistent/stream.cuh>

namespace dsv4::persistent {

constexpr int MOST_PARTS = 16;
constexpr int EARLY_BLOCKS = 3;  // are unpacked early, of a chunk's four: as many as there are registers for
constexpr int EIGHT_BLOCKS = 2;  // the same of FP8: a chunk's both

static_assert(CHUNK == linear::CHUNK, "slice_product takes a ring's stages");

struct Linear {
    linear::Part parts[MOST_PARTS];
    const float* norm;  // [K] weights of a norm that comes first; or null
    float eps;
    int count, tokens, columns, blocks, slices;  // of parts; ..; K; K/64; K/512
    int per_token, per_slice;                    // 2^16 / tokens and / slices, and one: they divide what is far below 2^16
    int tiles_on, slices_on;                     // from a unit to the WARPS-th behind it
    int slots_at, made_at, norm_at;              // of the work area: sums; Made of the block's tiles; the norm's weights
    uint16_t cuts[MAX_BLOCKS + 1];               // block b has the tiles cuts[b] .. cuts[b + 1]
    mhc::Peers peers;                            // whom the result is told instead of being written; size 0: nobody
};

// What a part's out_f32 says: results are BF16, or float32; or words, with float32 and the number of this phase, which
// those look for who do not meet behind it.
enum Results : int { BF16 = 0, F32 = 1, TOLD = 2 };

// Where a tile's results go, and what its sums are multiplied with.
struct alignas(16) Made {
    uint8_t* out;   // of the first token, where they are written
    float alpha;
    uint32_t what;  // how many of the rows there are, Results (x 32), bytes to the next token (x 128)

    static __device__ __forceinline__ Made of(const linear::Part& part, int row) {
        const int size = 2 << part.out_f32, rows = min(part.rows - row, linear::TILE_ROWS);
        const uint32_t pitch = static_cast<uint32_t>(part.out_stride) * size;
        return {static_cast<uint8_t*>(part.out) + row * size, part.alpha, rows | part.out_f32 << 5 | pitch << 7};
    }
    __device__ __forceinline__ int rows() const { return what & 31; }
    __device__ __forceinline__ void put(int token, int row, float y) const {
        uint8_t* const at = out + token * (what >> 7);
        if (what & F32 << 5) reinterpret_cast<float*>(at)[row] = y;
        else if (what & TOLD << 5) tell(reinterpret_cast<uint64_t*>(at) + row, y);
        else reinterpret_cast<bf16*>(at)[row] = from_float<bf16>(y);
    }
    static __device__ __forceinline__ void tell(uint64_t* to, float y) {
        exchange::tell_peer(to, y, told_by(phase_at(current_turn()).number));
    }
};
constexpr int MADE_LEAST = 8192;           // behind what a seam still reads while its successor is prepared
constexpr uint32_t MADE_PITCH = 1u << 25;  // bytes to the next token are fewer
static_assert(sizeof(Made) == 16, "MADE_BYTES in dsv4/kernels/decode_layers/describe.py");

// Where parts begin: a lane has the first tile of the part of its number.
struct Starts {
    int mine;

    __device__ __forceinline__ explicit Starts(const Linear& a) : mine(INT_MAX) {
        if (static_cast<int>(threadIdx.x % 32) < a.count) mine = a.parts[threadIdx.x % 32].first_tile;
    }
    __device__ __forceinline__ int of(int part) const { return __shfl_sync(0xFFFFFFFFu, mine, part); }
    __device__ __forceinline__ int part_of(int tile) const { return __popc(__ballot_sync(0xFFFFFFFFu, mine <= tile)) - 1; }
};

// A warp's units: a tile of the block, the part it belongs to, and a slice. Every WARPS-th is its own.
struct LinearUnit {
    int tile, slice, part, end;  // end: the tile behind the block's last one of the part

    // The warp's first unit, if there is one.
    __device__ __forceinline__ void begin(const Linear& a, const Starts& starts, int first, int tiles) {
        const int warp = threadIdx.x / 32;
        tile = warp * a.per_slice >> 16, slice = warp - tile * a.slices;
        part = starts.part_of(first + tile), end = min(starts.of(part + 1) - first, tiles);
    }
    __device__ __forceinline__ void find_part(const Linear& a, int first, int tiles) {
        do end = ++part + 1 < a.count ? min(a.parts[part + 1].first_tile - first, tiles) : tiles;
        while (tile >= end);
    }
    // Whether the part is another one, which is to be found, or there is no more.
    __device__ __forceinline__ bool advance(const Linear& a) {
        step(a, tile, slice);
        return tile >= end;
    }
    // From a (tile, slice), or (token, slice), to the WARPS-th behind it.
    static __device__ __forceinline__ void step(const Linear& a, int& tile, int& slice) {
        slice += a.slices_on, tile += a.tiles_on;
        if (slice >= a.slices) slice -= a.slices, ++tile;
    }
    static __device__ __forceinline__ int blocks(int slice, int all) {
        return min(all - slice * linear::SLICE_BLOCKS, linear::SLICE_BLOCKS);
    }
};

// FP8: scales of so many of a warp's units are a lane's each, one behind the other.
constexpr int SCALED_UNITS = 32 / linear::SLICE_SCALES;

// What is known before the tokens are: the block's tiles, the part of the first one, what a lane reads first of x, the
// warp's first unit, and the first blocks of that, unpacked, if it is a whole slice of NVFP4 or FP8.
struct Ahead {
    bool ready;
    float scale;          // of FP8, of the first units: the lane's
    int block;            // its tiles, from bit 16 on the part of the first one; below 0: the phase is ROUTE
    const bf16* x;        // or null
    uint32_t columns[8];  // what lies there: read as soon as the tokens are known
    LinearUnit unit;
    uint32_t a[EARLY_BLOCKS][1][4][4];
    w4::Lane last;  // of the chunk, as it came

    __device__ __forceinline__ int tiles() const { return block & 0xFFFF; }
    __device__ __forceinline__ int own() const { return block >> 16 & 0x7FFF; }
    __device__ __forceinline__ bool routes() const { return block < 0; }
    __device__ __forceinline__ bool works() const { return tiles() > 0 || routes(); }
};

// Where a lane's sixteen columns of a slice of a token begin.
__device__ __forceinline__ const bf16* column_of(const linear::Part& part, int token, int slice) {
    return part.x + token * part.x_stride + slice * SLICE + threadIdx.x % 32 * 16;
}

// The lane's scale of FP8 for the warp's units from `unit` on; 0 where it has none.
__device__ __forceinline__ float unit_scale(const Linear& a, LinearUnit unit, int tiles) {
    const int lane = threadIdx.x % 32, first = a.cuts[blockIdx.x];
#pragma unroll 1
    for (int i = 0; i < lane / linear::SLICE_SCALES; ++i) unit.step(a, unit.tile, unit.slice);
    if (unit.tile >= tiles) return 0.0f;
    if (unit.tile >= unit.end) unit.find_part(a, first, tiles);
    const linear::Part& part = a.parts[unit.part];
    if (part.format != linear::FP8) return 0.0f;
    const int column = unit.slice * linear::SLICE_SCALES + lane % linear::SLICE_SCALES;
    return linear::scale_of(part, first + unit.tile - part.first_tile, column);
}

// Every thread calls, after come() behind the phase in front: what the block and the warp have to do.
template <bool ONE, bool EIGHT>
__device__ __forceinline__ void find_work(int turn, Ahead& ahead) {
    const Linear& a = payload<Linear>(turn);
    const int first = a.cuts[blockIdx.x], tiles = a.cuts[blockIdx.x + 1] - first;
    const Starts starts(a);
    ahead.block = tiles | starts.part_of(first) << 16 | (phase_at(turn).kind == ROUTE) << 31;
    ahead.unit.begin(a, starts, first, tiles);
    if (EIGHT) ahead.scale = unit_scale(a, ahead.unit, tiles);
    const int column = ahead.unit.slice * SLICE + static_cast<int>(threadIdx.x % 32) * 16;
    const bool reads = tiles > 0 && ahead.unit.tile < rows_of<ONE>(a.tokens) && column < a.columns;
    ahead.x = reads ? column_of(a.parts[ahead.own()], ahead.unit.tile, ahead.unit.slice) : nullptr;
#pragma unroll 1
    for (int tile = threadIdx.x / 32; tile < tiles; tile += WARPS) {
        const linear::Part& part = a.parts[starts.part_of(first + tile)];
        if (threadIdx.x % 32 == 0)
            reinterpret_cast<Made*>(memory() + WORK_AT + a.made_at)[tile] =
                Made::of(part, (first + tile - part.first_tile) * linear::TILE_ROWS);
    }
}

// The same: the norm's weights are on their way.
template <bool ONE>
__device__ __forceinline__ void linear_ahead(int turn) {
    const Linear& a = payload<Linear>(turn);
    const int at = threadIdx.x * 16;
    RowNumbers(a.peers, rows_of<ONE>(a.tokens)).put();
    if (a.norm == nullptr) return;
    for (int i = at; i < a.columns * 4; i += THREADS * 16)
        start_copy16(shared_address(memory()) + WORK_AT + a.norm_at + i, reinterpret_cast<const uint8_t*>(a.norm) + i);
}

// The first thing to do when the tokens are known: all that follows has time until they are here.
__device__ __forceinline__ void look_at_tokens(Ahead& ahead) {
    load_columns(ahead.columns, ahead.x, ahead.x != nullptr);
}

template <bool EIGHT>
__device__ __forceinline__ void prepare_linear(int turn, Stream& stream, Ahead& ahead) {
    const Linear& a = payload<Linear>(turn);
    const LinearUnit& unit = ahead.unit;
    if (unit.tile >= ahead.tiles()) return;
    const int lane = threadIdx.x % 32, format = a.parts[unit.part].format;
    ahead.ready = (EIGHT ? format != linear::PLAIN : format == linear::NVFP4) &&
                  unit.blocks(unit.slice, a.blocks) == linear::SLICE_BLOCKS;
    if (!ahead.ready) return;
    stream.wait();
    if (EIGHT && format == linear::FP8) {
        const uint8_t* const codes = stream.byte(lane * 16);
#pragma unroll
        for (int k = 0; k < EIGHT_BLOCKS; ++k) linear::fp8_operands(ahead.a[k][0], codes + k * 1024);
        if (!stream.replace()) stream.release();
        return;
    }
    const uint8_t *const codes = stream.byte(lane * 16), *const scales = stream.byte(lane * 2 + w4::CODE_BYTES);
#pragma unroll
    for (int k = 0; k < EARLY_BLOCKS; ++k)
        linear::nvfp4_operands(ahead.a[k][0], w4::load(codes + k * w4::BLOCK_BYTES, scales + k * w4::BLOCK_BYTES));
    ahead.last = w4::load(codes + EARLY_BLOCKS * w4::BLOCK_BYTES, scales + EARLY_BLOCKS * w4::BLOCK_BYTES);
    if (!stream.replace()) stream.release();
}

// sum += the first chunk of the unit, which `ahead` has; how many blocks that are.
template <bool EIGHT>
__device__ __forceinline__ int begin_unit(float (&sum)[1][4], const Ahead& ahead, int format, const uint8_t* x) {
    if (EIGHT && format == linear::FP8) {
        const float scale[1] = {__shfl_sync(0xFFFFFFFFu, ahead.scale, 0)};
#pragma unroll
        for (int k = 0; k < EIGHT_BLOCKS; ++k) linear::fp8_product(sum, ahead.a[k], x + k * 128, scale);
        return EIGHT_BLOCKS;
    }
#pragma unroll
    for (int k = 0; k < EARLY_BLOCKS; ++k) linear::block_product<linear::NVFP4>(sum, ahead.a[k], x + k * 128);
    uint32_t a[1][4][4];
    linear::nvfp4_operands(a[0], ahead.last);
    linear::block_product<linear::NVFP4>(sum, a, x + EARLY_BLOCKS * 128);
    return EARLY_BLOCKS + 1;
}

// The first slice that a warp stages, which `ahead` has, is normed as norm_row does it: there are no more slices of tokens
// than warps. shares [tokens][2 slices]: a row's sums of squares, by 256 columns.
template <bool ONE>
__device__ __forceinline__ void norm_columns(const Linear& a, Ahead& ahead, float* shares) {
    const int lane = threadIdx.x % 32, token = ahead.unit.tile, slice = ahead.unit.slice;
    const int column = slice * SLICE + lane * 16;
    const bool mine = token < rows_of<ONE>(a.tokens);
    uint32_t(&pairs)[8] = ahead.columns;
    const auto value = [&](int i) { return __uint_as_float(i % 2 ? pairs[i / 2] & 0xFFFF0000u : pairs[i / 2] << 16); };
    float v[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = value(i);
    const float share = norm_share(v);
    shares += token * 2 * a.slices;
    if (mine && lane % 16 == 0) shares[2 * slice + lane / 16] = share;
    wait_for_copies();
    __syncthreads();
    if (!mine) return;
    const float scale = norm_scale(shares, 2 * a.slices, a.columns, a.eps);
    for (uint32_t& pair : pairs) asm volatile("" : "+r"(pair));  // else the sixteen values would be kept until here
    const float4* weights = reinterpret_cast<const float4*>(memory() + WORK_AT + a.norm_at + column * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float4 w = column < a.columns ? weights[i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const int k = 4 * i;
        pairs[2 * i] = bf16x2(normed(value(k), scale, w.x), normed(value(k + 1), scale, w.y));
        pairs[2 * i + 1] = bf16x2(normed(value(k + 2), scale, w.z), normed(value(k + 3), scale, w.w));
    }
}

// Slices of tokens are staged as warps take units: every WARPS-th is a warp's. The first one has been looked at; one row has
// no more, of more rows two are on their way at a time.
template <bool ONE>
__device__ __forceinline__ void stage(const Linear& a, Ahead& ahead, uint8_t* x, int stride, float* undo) {
    constexpr int AT_ONCE = 2;
    const int all = rows_of<ONE>(a.tokens);
    const linear::Part& part = a.parts[ahead.own()];
    const auto put = [&](uint32_t (&pairs)[8], int token, int slice) {
        if (token < all)
            linear::put_slice(pairs, part.format == linear::PLAIN, x + token * stride + slice * 1024,
                              undo + slice * TOKENS + token);
    };
    int token = ahead.unit.tile, slice = ahead.unit.slice;
    put(ahead.columns, token, slice);
    if (ONE) return;
    LinearUnit::step(a, token, slice);
#pragma unroll 1
    while (token < all) {
        uint32_t pairs[AT_ONCE][8];
        int tokens[AT_ONCE], slices[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int column = slice * SLICE + static_cast<int>(threadIdx.x % 32) * 16;
            tokens[i] = token, slices[i] = slice;
            load_columns(pairs[i], column_of(part, token, slice), token < all && column < a.columns);
            LinearUnit::step(a, token, slice);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) put(pairs[i], tokens[i], slices[i]);
    }
}

// Work area: x [tokens][slices] | undo [slices][8] | slots [tile][slice][tokens][16] | Made [tile] | the norm's weights.
// The products of a block with tiles, which it has sums of behind a barrier.
template <bool ONE, bool EIGHT>
__device__ __forceinline__ void linear_products(int turn, Stream& stream, Ahead& ahead) {
    const Linear& a = payload<Linear>(turn);
    const int tiles = ahead.tiles();
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int stride = a.slices * 1024 + 16, tokens = rows_of<ONE>(a.tokens), step = tokens * linear::TILE_ROWS;
    uint8_t* const x = memory() + WORK_AT;
    float* const undo = reinterpret_cast<float*>(x + tokens * stride);
    float* const slots = reinterpret_cast<float*>(x + a.slots_at);
    if (a.norm != nullptr) norm_columns<ONE>(a, ahead, slots);
    stage<ONE>(a, ahead, x, stride, undo);
    const uint8_t* const mine = x + linear::lane_columns(tokens, stride);
    LinearUnit unit = ahead.unit;
    asm volatile("" : "+r"(unit.part));  // else where the part lies would be kept since it was looked at ahead
    if (unit.tile < tiles) {
        const int blocks = a.blocks;
        float* slot = slots + threadIdx.x / 32 * step + 2 * t * linear::TILE_ROWS + g;
        float sum[1][4] = {};
        int back = static_cast<int>(reinterpret_cast<uint8_t*>(undo + 2 * t) - memory());
        asm volatile("" : "+r"(back));  // else its sum with what comes in front would be made in two steps, each time
        int begun = 0, format = a.parts[unit.part].format, least = linear::least_of(format);
        float scale = linear::undo_of(format);
        __syncthreads();
        if (ahead.ready) begun = begin_unit<EIGHT>(sum, ahead, format, mine + unit.slice * 1024);
        int number = 0;  // of the unit, in turn
        const auto scales = [&](float (&of_tile)[1], int left) {
            const int at = (unit.blocks(unit.slice, blocks) - left) / 2 + number % SCALED_UNITS * linear::SLICE_SCALES;
            of_tile[0] = __shfl_sync(0xFFFFFFFFu, ahead.scale, at);
        };
#pragma unroll 1
        while (true) {
            linear::slice_product<1, EIGHT>(
                sum, format, unit.blocks(unit.slice, blocks) - begun, mine + unit.slice * 1024 + begun * 128, lane,
                stream, scales, [](Stream& s) { return s.replace(); }, [](Stream& s) { s.release(); }, least);
            begun = 0;
            linear::undo_scaling(sum, scale, reinterpret_cast<const float*>(memory() + (back + unit.slice * TOKENS * 4)));
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (2 * t + i % 2 < tokens) slot[i % 2 * linear::TILE_ROWS + i / 2 * 8] = sum[0][i];
            asm volatile("mov.b64 {%0, %1}, 0; mov.b64 {%2, %3}, 0;"
                         : "=f"(sum[0][0]), "=f"(sum[0][1]), "=f"(sum[0][2]), "=f"(sum[0][3]));
            slot += WARPS * step;
            const bool other = unit.advance(a);
            if (other && unit.tile >= tiles) break;
            if (EIGHT && ++number % SCALED_UNITS == 0) ahead.scale = unit_scale(a, unit, tiles);
            if (!other) continue;
            unit.find_part(a, a.cuts[blockIdx.x], tiles);
            format = a.parts[unit.part].format, scale = linear::undo_of(format), least = linear::least_of(format);
        }
    } else {
        __syncthreads();
    }
    stream.park();
}

// Their sums are added up. before(): what the speaker's warp does when it has multiplied; behind(): what is done when all
// have. In a block without tiles no more than these.
template <bool ONE, typename Before, typename Behind>
__device__ __forceinline__ void linear_sums(int turn, const Ahead& ahead, Before&& before, Behind&& behind) {
    const Linear& a = payload<Linear>(turn);
    if (threadIdx.x / 32 == SPEAKER / 32) before();
    constexpr int AT_ONCE = 8;
    const int tokens = rows_of<ONE>(a.tokens), step = tokens * linear::TILE_ROWS, tiles = ahead.tiles();
    const float* const slots = reinterpret_cast<const float*>(memory() + WORK_AT + a.slots_at);
    const int row = threadIdx.x % linear::TILE_ROWS, slices = a.slices, ranks = a.peers.size;
    int made_at = WORK_AT + a.made_at;
    asm volatile("" : "+r"(made_at));  // else it would be looked up behind the barrier
    __syncthreads();
    behind();
    for (int i = threadIdx.x; i < tiles * step; i += THREADS) {
        const int pair = i / linear::TILE_ROWS, at = ONE ? pair : pair * a.per_token >> 16, token = pair - at * tokens;
        const Made made = reinterpret_cast<const Made*>(memory() + made_at)[at];
        const float* slot = slots + at * slices * step + token * linear::TILE_ROWS + row;
        float y = 0.0f;
#pragma unroll 1
        for (int begin = 0; begin < slices; begin += AT_ONCE, slot += AT_ONCE * step) {
            float parts[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) parts[k] = begin + k < slices ? slot[k * step] : 0.0f;
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k)
                if (begin + k < slices) y += parts[k];
        }
        y *= made.alpha;
        if (row >= made.rows()) continue;
        if (ranks == 0) made.put(token, row, y);
        else a.peers.tell_all(token, (a.cuts[blockIdx.x] + at) * linear::TILE_ROWS + row, y, position().numbers[token]);
    }
}

// cuts [grid + 1]. norm [K], if there is one: x is normed first. joined: the next phase is one that needs nothing of this.
// K is a multiple of 16, and x can be read 16 bytes at a time. size > 0: the ranks, of mhc_seam, whom the one part's result
// is told; the next phase is that seam.
static cudaError_t describe_linear(Phase* phase, const linear::Part* parts, int count, const uint16_t* cuts, int grid,
                                   int tokens, int columns, const float* norm, float eps, int joined,
                                   uint64_t* const* inboxes, uint32_t* turns, int rank, int size) {
    if (size < 0 || size > mhc::MOST_RANKS || (size > 0 && count > 1)) return cudaErrorInvalidValue;
    if (count < 1 || count > MOST_PARTS || grid > MAX_BLOCKS || tokens < 1 || tokens > TOKENS) return cudaErrorInvalidValue;
    Linear a = {};
    for (int i = 0; i < count; ++i) a.parts[i] = parts[i];
    for (int b = 0; b <= grid; ++b) a.cuts[b] = cuts[b];
    a.count = count, a.tokens = tokens, a.columns = columns;
    a.blocks = (columns + linear::BLOCK_COLUMNS - 1) / linear::BLOCK_COLUMNS;
    a.slices = (a.blocks + linear::SLICE_BLOCKS - 1) / linear::SLICE_BLOCKS;
    if (a.slices < 1 || a.slices > WARPS || columns % 16) return cudaErrorInvalidValue;
    for (int i = 0; i < count; ++i) {
        const linear::Part& part = parts[i];
        if (!part.x_wide || part.row_scale != nullptr || part.out_stride < 0 || part.out_stride * 8 >= MADE_PITCH)
            return cudaErrorInvalidValue;
    }
    a.per_token = (1 << 16) / tokens + 1, a.per_slice = (1 << 16) / a.slices + 1;
    a.tiles_on = WARPS / a.slices, a.slices_on = WARPS % a.slices;
    a.norm = norm, a.eps = eps;
    if (norm != nullptr && (tokens * a.slices > WARPS || columns > 4096 || !aligned16(norm))) return cudaErrorInvalidValue;
    int most = 0;
    for (int b = 0; b < grid; ++b) most = max(most, cuts[b + 1] - cuts[b]);
    a.slots_at = tokens * (a.slices * 1024 + 16) + a.slices * TOKENS * 4;
    a.made_at = max(a.slots_at + most * a.slices * tokens * 64, MADE_LEAST);
    a.norm_at = a.made_at + most * static_cast<int>(sizeof(Made));
    a.peers = mhc::peers_of(inboxes, turns, nullptr, 0, rank, size);
    fill_phase(phase, LINEAR, a);
    phase->joined = joined || size > 0 ? NEXT : 0;
    for (int i = 0; i < count; ++i)
        if (parts[i].format == linear::FP8) phase->joined |= EIGHT_PHASE;
    return cudaSuccess;
}

}  // namespace dsv4::persistent
