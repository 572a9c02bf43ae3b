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

// What a warp reads of routed weights: a tile, or a piece of one. No bytes: nothing more.
struct alignas(16) Routed {
    const uint8_t* from;
    int bytes;
    uint32_t what;  // group, tile of the group (of down: of the block), piece, halvings, number among those that are cut

    __device__ __forceinline__ int group() const { return what & 63; }
    __device__ __forceinline__ int tile() const { return what >> 6 & 4095; }
    __device__ __forceinline__ int piece() const { return what >> 18 & 15; }
    __device__ __forceinline__ int halvings() const { return what >> 22 & 7; }
    __device__ __forceinline__ int number() const { return what >> 25; }
};
constexpr int AHEAD = MAX_STAGES, PIECES = 2 * AHEAD;  // of each warp, known at a time: work is at most AHEAD behind

// The work area begins with this. Staged rows follow: of the shared expert, behind them its scores and keys, then of x,
// then of mid; the factors that undo their scaling, those of the shared expert, sums of its slices [tile][slice][T][16],
// results of down [tile][place][16], sums of slices of tiles that are cut [tile][slice][T][16].
struct alignas(128) ExpertsPlan {
    moe::FewPlan pairs;
    float alpha[moe::FEW_PAIRS][3];  // by group: of gate, up and down
    Routed list[WARPS][PIECES];
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

    __device__ __forceinline__ Cut(int tiles, int blocks, int parks) : halvings(0) {
        const int cuts = moe::cuts_of(blocks), rest = tiles % WARPS;
        int least = 1 << cuts;  // slices of a warp
#pragma unroll
        for (int by = 1; by <= 4; ++by) {
            const int slices = ((rest << by) + WARPS - 1) / WARPS << max(cuts - by, 0);
            const bool can = by <= cuts && blocks >> by >= moe::CHUNK_BLOCKS && rest << cuts <= parks;
            if (can && slices < least) least = slices, halvings = by;
        }
        whole = tiles - rest, end = whole + (rest << halvings);
    }
    __device__ __forceinline__ int of_warp() const { return max(end + WARPS - 1 - int(threadIdx.x / 32), 0) / WARPS; }
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

// Of all that the warp reads in the passes, the pieces from `first` on, a lane each.
static __device__ __forceinline__ void list_pieces(int turn, moe::Share share, int parks, int first, int count) {
    const Experts& a = payload<Experts>(turn);
    ExpertsPlan& plan = work<ExpertsPlan>();
    const int warp = threadIdx.x / 32, index = first + threadIdx.x % 32;
    if (threadIdx.x % 32 < count) {
        Routed piece = {};
        Pass pass(a, share, parks);
        int at = index;
        bool exists = true;
        while (exists && at >= pass.cut.of_warp()) at -= pass.cut.of_warp(), exists = pass.next(a, share, parks);
        if (exists) {
            at = at * WARPS + warp;
            const bool whole = at < pass.cut.whole;
            const int by = whole ? 0 : pass.cut.halvings, number = whole ? 0 : (at - pass.cut.whole) >> by;
            const int part = whole ? 0 : at - pass.cut.whole - (number << by);
            const int2 tile = pass.find(a, share, whole ? at : pass.cut.whole + number);
            const moe::Job& job = pass.down ? a.second : a.first;
            const int64_t row = static_cast<int64_t>(plan.pairs.groups[tile.x].x) * job.rows + tile.y +
                                (pass.down ? share.first_tile : 0);
            const int begin = moe::piece_begin(job.blocks, part, by), end = moe::piece_begin(job.blocks, part + 1, by);
            piece.from = job.tiles + (row * job.blocks + begin) * w4::BLOCK_BYTES;
            piece.bytes = (end - begin) * w4::BLOCK_BYTES;
            piece.what = tile.x | tile.y << 6 | part << 18 | by << 22 | static_cast<uint32_t>(number) << 25;
        }
        plan.list[warp][index % PIECES] = piece;
    }
    __syncwarp();
}

// A warp's ring, and what it asks for: as far as the list of the stream goes, its routed weights, then that list beyond.
struct Feed {
    Stream& stream;
    const Routed* list;
    int next = 0;  // of the routed ones; -1 beyond them
    bool routed = false;

    __device__ __forceinline__ bool more() {
        bool found = false;
#pragma unroll 1
        while (!found) {
            Segment segment;
            if (routed) {
                const Routed piece = list[next % PIECES];
                segment = {piece.from, piece.bytes, CHUNK};
            } else {
                segment = stream.ahead();
            }
            found = routed ? segment.bytes > 0 : segment.chunk > 0;
            if (found) stream.open(segment.from, segment.bytes, segment.chunk);
            if (!found && !routed && next < 0) return false;
            const bool over = found != routed;  // a segment of the stream's list: one that is opened, or the marker
            if (found && routed) ++next;
            if (!found) next = routed ? -1 : 0, routed = !routed;
            if (over) stream.pass();
        }
        return true;
    }
    // Asks for a chunk, if a stage is free.
    __device__ __forceinline__ void ask() {
        if (stream.held == stream.stages || (stream.left == 0 && !more())) return;
        const int now = min(stream.left, stream.chunk);
        const uint32_t base = shared_address(memory());
        if (elected())
            bulk_load(base + stream.data + stream.tail * CHUNK, stream.from, now, base + stream.full + 8 * stream.tail);
        stream.from += now, stream.left -= now, ++stream.held;
        if (++stream.tail == stream.stages) stream.tail = 0;
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
