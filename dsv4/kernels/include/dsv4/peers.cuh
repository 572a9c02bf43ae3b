// A sum over ranks, made by the kernel that needs it: blocks of 64 columns, each by itself.
#pragma once
#include <dsv4/exchange.cuh>

namespace dsv4::mhc {

constexpr int COLUMNS = 64, MOST_COLUMNS = 8192;  // of a block; of a row
constexpr int MOST_RANKS = 8, INBOX_ROWS = 64, NUMBERED_ROWS = 8;
constexpr int MANY_ROWS = 128, MANY_COLUMNS = 7168;  // of plain words
static_assert(MANY_ROWS * MANY_COLUMNS == 2 * (INBOX_ROWS - NUMBERED_ROWS) * MOST_COLUMNS, "they fill an inbox");

// The ranks whose parts make up y, none if there is one rank. Each has an inbox [2][size][INBOX_ROWS][MOST_COLUMNS] of
// 8 bytes, which the others write: NUMBERED_ROWS of values with the number of the turn, for launches of few rows, and
// behind them [MANY_ROWS][MANY_COLUMNS] plain words (exchange.cuh), for those of more. A rank tells its part of turn n to
// all and hears theirs in its own inbox; it adds them in the order of ranks and rounds the sum once.
//
// The two halves take turns. A rank writes turn n + 2 over turn n of a peer once its launch of turn n + 1 has ended, so
// it has heard that turn from the peer, whose launch of turn n had then ended: all of turn n was read, and plain words are
// 0 again. Every row has its own number, which all ranks count alike since they launch alike. A launch tells all of its
// rows before it hears one, and all of its blocks run at once.
struct Peers {
    uint64_t* inboxes[MOST_RANKS];
    uint32_t* turns;    // [MANY_ROWS] the last turn of each row
    const float* part;  // [T, D]: what this rank gives
    int64_t stride;     // of its rows
    int rank, size;

    __device__ bool any() const { return size > 1; }
    __device__ uint32_t turn_of(int64_t token) const { return exchange::last_turn(turns + token) + 1; }
    // Where an inbox has a column of what `from` tells.
    __device__ int64_t place_of(int from, int64_t token, int column, uint32_t turn) const {
        return (((turn & 1) * size + from) * INBOX_ROWS + token) * MOST_COLUMNS + column;
    }
    __device__ uint64_t* at(int owner, int from, int64_t token, int column, uint32_t turn) const {
        return inboxes[owner] + place_of(from, token, column, turn);
    }
    // To all ranks, this one as well: by who makes a column, so that nobody has to read it first.
    __device__ __forceinline__ void tell_all(int64_t token, int column, float value, uint32_t turn) const {
        tell_at(place_of(rank, token, column, turn), value, turn);
    }
    // The same, of a place in every inbox.
    __device__ __forceinline__ void tell_at(int64_t place, float value, uint32_t turn) const {
#pragma unroll 1
        for (int i = 1; i <= size; ++i)
            exchange::tell_peer(inboxes[exchange::rank_after(rank, i, size)] + place, value, turn);
    }
    __device__ uint32_t* plain_at(int owner, int from, int64_t token, int column, uint32_t turn) const {
        return reinterpret_cast<uint32_t*>(at(owner, from, NUMBERED_ROWS, 0, turn)) + token * MANY_COLUMNS + column;
    }
    // This rank's part of four columns, in plain words.
    __device__ __forceinline__ void tell_four(int64_t token, int column, const float (&own)[4], uint32_t turn) const {
#pragma unroll 1
        for (int i = 1; i < size; ++i) {
            const int to = exchange::rank_after(rank, i, size);
            exchange::tell_four(plain_at(to, rank, token, column, turn), own);
        }
    }
    // This rank's part of four columns becomes the sum of all. Those of TOGETHER ranks are asked for at once.
    __device__ __forceinline__ void hear_four(int64_t token, int column, float (&part)[4], uint32_t turn) const {
        constexpr int TOGETHER = 2;
        constexpr int64_t NEXT = 2 * INBOX_ROWS * MOST_COLUMNS;
        uint32_t* from = plain_at(rank, 0, token, column, turn);
        float sum[4] = {};
#pragma unroll 1
        for (int first = 0; first < size; first += TOGETHER, from += TOGETHER * NEXT) {
            exchange::Four heard[TOGETHER] = {};
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
                if (first + i < size && first + i != rank) heard[i] = exchange::look_at_four(from + i * NEXT);
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
                if (first + i < size) {
                    const bool known = first + i == rank;
                    if (!known) {
                        while (!heard[i].here()) heard[i] = exchange::look_at_four(from + i * NEXT);
                        exchange::clear_four(from + i * NEXT);
                    }
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const float value = known ? part[k] : heard[i].value(k);
                        sum[k] = first + i == 0 ? value : sum[k] + value;
                    }
                }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) part[k] = sum[k];
    }
};

static Peers peers_of(uint64_t* const* inboxes, uint32_t* turns, const float* part, int64_t stride, int rank, int size) {
    Peers p = {};
    for (int i = 0; i < size && inboxes != nullptr; ++i) p.inboxes[i] = inboxes[i];
    p.turns = turns, p.part = part, p.stride = stride, p.rank = rank, p.size = size;
    return p;
}

// A warp's two columns of a slice, of a token: this rank's part of them, and where the ranks meet. told: the parts have been
// told by those who made them, this rank's own to itself.
struct Meeting {
    const Peers& p;
    int64_t token;
    bool told;
    int d;
    float2 own = {};

    __device__ Meeting(const Peers& peers, int64_t token, int slice, int D, bool told = false)
        : p(peers), token(token), told(told) {
        take(slice, D);
    }
    __device__ void take(int slice, int D) {
        d = slice * COLUMNS + threadIdx.x % 32 * 2;
        if (told) return;
        const float* part = p.part + token * p.stride + d;
        own = make_float2(d < D ? part[0] : 0.0f, d + 1 < D ? part[1] : 0.0f);
    }
    __device__ uint64_t* at(int owner, int from, uint32_t turn) const { return p.at(owner, from, token, d, turn); }
    __device__ bool known(int rank) const { return rank == p.rank && !told; }
    __device__ void tell(uint32_t turn) const {
#pragma unroll 1
        for (int i = 1; i < p.size; ++i) {
            const int to = exchange::rank_after(p.rank, i, p.size);
            exchange::tell_peer(at(to, p.rank, turn), own.x, own.y, turn);
        }
    }
    // The sum of all parts. Those of TOGETHER ranks are asked for at once. By a whole warp, which stays together.
    template <int TOGETHER>
    __device__ __forceinline__ float2 hear(uint32_t turn) const {
        constexpr int64_t NEXT = INBOX_ROWS * MOST_COLUMNS;
        const uint64_t* from = at(p.rank, 0, turn);
        float2 sum = {};
#pragma unroll 1
        for (int first = 0; first < p.size; first += TOGETHER, from += TOGETHER * NEXT) {
            exchange::Pair heard[TOGETHER] = {};
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
                if (first + i < p.size && !known(first + i)) heard[i] = exchange::look_at_peer(from + i * NEXT);
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
                if (first + i < p.size) {
                    float2 part = own;
                    if (!known(first + i)) {
                        while (__any_sync(0xffffffffu, !heard[i].of(turn)))
                            heard[i] = exchange::look_at_peer(from + i * NEXT);
                        part = make_float2(heard[i].value(0), heard[i].value(1));
                    }
                    sum = first + i == 0 ? part : make_float2(sum.x + part.x, sum.y + part.y);
                }
        }
        return sum;
    }
};

}  // namespace dsv4::mhc
