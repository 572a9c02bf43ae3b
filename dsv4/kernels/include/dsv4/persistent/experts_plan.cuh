// What EXPERTS is given, how it lays its work area out, how tiles go to warps, and the order in which a warp asks for
// their weights.
#pragma once
#include <dsv4/linear.cuh>
#include <dsv4/moe_few_product.cuh>
#include <dsv4/persistent/stream.cuh>
#include <dsv4/router.cuh>

namespace dsv4::persistent {

static_assert(WARPS == moe::FEW_WARPS && TOKENS == moe::TOKENS && CHUNK == moe::CHUNK, "a phase is like the op's kernel");

struct Experts {
    routing::Arguments route;  // without what it writes
    moe::Job first, second;    // without plans and factors
    linear::Part shared;       // the shared expert's second product, of what `gate` and `up` make
    const bf16 *gate, *up;     // [T, F]
    int64_t gate_stride, up_stride;
    void* out;       // [T, D] float or bf16
    int out_f32, tokens;
    int keys;        // experts, rounded up to what the lanes of a warp have
    int slices;      // of the shared expert's columns
    int2 of_block;   // tiles of down that every block has, and how many blocks have one more
    int room;        // rows of mid that are staged at a time
    int parks;       // slices whose sums can wait
    int undo, shared_undo, slots, results, parked;  // where in the work area
};

// The work area begins with this. Staged rows follow: of the shared expert, behind them its scores and keys, then of x,
// then of mid; the factors that undo their scaling, those of the shared expert, sums of its slices [tile][slice][T][16],
// results of down [tile][place][16], sums of slices of tiles that are cut [tile][slice][T][16].
struct alignas(128) ExpertsPlan {
    moe::FewPlan pairs;
    float alpha[moe::FEW_PAIRS][3];  // by group: of gate, up and down
};
constexpr int STAGED_AT = sizeof(ExpertsPlan);

__host__ __device__ __forceinline__ int shared_stride(int slices) { return slices * 1024 + 16; }

template <typename T>
__device__ __forceinline__ T* work_at(int offset) {
    return reinterpret_cast<T*>(memory() + WORK_AT + offset);
}

// Of the tiles of a pass every warp has as many whole ones; those that are left over are cut into 2^halvings pieces, so
// that no warp has much more than others.
struct Cut {
    int whole, end, halvings;  // end: whole tiles and pieces

    __device__ __forceinline__ Cut(int tiles, int blocks, int parks) {
        const int cuts = moe::cuts_of(blocks), rest = tiles % WARPS, by = threadIdx.x % 8;
        const bool can = by <= cuts && (by == 0 || (blocks >> by >= moe::CHUNK_BLOCKS && rest << cuts <= parks));
        const unsigned slices = ((rest << by) + WARPS - 1) / WARPS << max(cuts - by, 0);  // of a warp
        halvings = __reduce_min_sync(moe::ALL, can ? slices << 3 | by : moe::ALL) & 7;
        whole = tiles - rest, end = whole + (rest << halvings);
    }
};

// A pass is over the block's tiles of gate and up, or over its rows of down for the experts of a batch.
struct Pass {
    bool down = false;
    moe::Batch batch = {0, 0, 0, 0};
    Cut cut;

    __device__ __forceinline__ Pass(const Experts& a, const moe::Share& share, int parks)
        : cut(share.count, a.first.blocks, parks) {}
    __device__ __forceinline__ bool next(const Experts& a, const moe::Share& share, int parks) {
        if (batch.to >= share.places) return false;
        down = true, batch = share.batch(batch.to, a.room);
        cut = Cut(batch.groups * share.tiles, a.second.blocks, parks);
        return true;
    }
    // Of the block's tile `tile`: its group, and its number in the group.
    __device__ __forceinline__ int2 find(const Experts& a, const moe::Share& share, int tile) const {
        const int at = down ? tile : share.begin + tile, across = down ? share.tiles : a.first.rows;
        const int group = moe::quotient(at, across);
        return make_int2(batch.group + group, at - group * across);
    }
};

// A warp's piece `at` of a pass.
struct Piece {
    int tile, piece, halvings;  // halvings: 0 if it is whole
    __device__ __forceinline__ Piece(const Cut& cut, int at) : tile(at), piece(0), halvings(0) {
        if (at < cut.whole) return;
        halvings = cut.halvings, tile = cut.whole + ((at - cut.whole) >> halvings);
        piece = at - cut.whole - ((tile - cut.whole) << halvings);
    }
};

// What a warp asks for: as far as the list goes, its pieces of all passes, then the list beyond.
struct Asks {
    const Experts& a;
    const ExpertsPlan& plan;
    const moe::Share& share;
    const int parks;
    Pass pass;
    int at;
    enum { LISTED, ROUTED, BEYOND } state = LISTED;

    __device__ __forceinline__ bool more(Stream& stream) {
        if (state != ROUTED) {
            if (stream.open_next()) return true;
            if (state == BEYOND) return false;
            state = ROUTED;
        }
        while (at >= pass.cut.end) {
            if (!pass.next(a, share, parks)) {
                stream.pass();
                state = BEYOND;
                return stream.open_next();
            }
            at = threadIdx.x / 32;
        }
        const Piece piece(pass.cut, at);
        const int2 tile = pass.find(a, share, piece.tile);
        const moe::Job& job = pass.down ? a.second : a.first;
        const int64_t row = static_cast<int64_t>(moe::uniform(plan.pairs.groups[tile.x].x)) * job.rows + tile.y +
                            (pass.down ? share.first_tile : 0);
        const int begin = moe::piece_begin(job.blocks, piece.piece, piece.halvings);
        const int end = moe::piece_begin(job.blocks, piece.piece + 1, piece.halvings);
        stream.open(job.tiles + (row * job.blocks + begin) * w4::BLOCK_BYTES, (end - begin) * w4::BLOCK_BYTES, CHUNK);
        at += WARPS;
        return true;
    }
};

// A warp's ring as the products know it.
struct Feed {
    Stream& stream;
    Asks& asks;
    __device__ __forceinline__ void ask() {
        stream.fill([&] { return asks.more(stream); });
    }
    __device__ __forceinline__ const uint8_t* wait() const { return stream.wait(); }
    __device__ __forceinline__ void refill() {
        stream.release();
        ask();
    }
};

// Sums of the slices of a tile that is cut, for whoever adds them up when all are there.
struct Parked {
    static constexpr bool NARROW = true;
    float* sums;  // [slice][T][16], null: of a whole tile
    int tokens;

    __device__ __forceinline__ bool operator()(int slice, const float (&sum)[4]) const {
        if (sums == nullptr) return false;
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        float* slot = sums + slice * tokens * 16 + g;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (2 * t + i % 2 < tokens) slot[(2 * t + i % 2) * 16 + i / 2 * 8] = sum[i];
        return true;
    }
    __device__ __forceinline__ void collect(float (&)[4], int, int) const {}
};

}  // namespace dsv4::persistent
