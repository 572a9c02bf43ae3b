// Scores of a row's part by all warps of a block, though it may have few entries: two warps, a pair, take sixteen at a
// time. Each unpacks the keys of eight for both and scores half of the heads. The second adds its heads to the sums of
// the first: their order is that of one warp (index_score.cuh).
#pragma once
#include <dsv4/index_score.cuh>
#include <dsv4/persistent/program.cuh>

namespace dsv4::persistent::pairs {

constexpr int PAIRS = WARPS / 2;  // warps p and p + PAIRS are a pair

struct Shared {
    uint4 keys[WARPS][4][32];  // of the tile that a warp unpacks: B operands, by lane
    float4 sums[PAIRS][32];    // of the first warps' heads
};

// As score_row's, of rows whose tiles are found for PAIRS warps. put(at, four): by the second warps.
template <bool RARE, typename Put>
static __device__ __forceinline__ void score_row(const index::Arguments& a, index::Heads<4, WARPS>& s, Shared& shared,
                                                 int row, const int64_t* pages, int rank, const index::Tiles& tiles,
                                                 Put put) {
    using index::ENTRIES;
    const int n = tiles.n;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int pair = warp % PAIRS, half = warp / PAIRS, stride = PAIRS * a.blocks;
    const uint32_t weight = threadIdx.x < 64 ? index::weight_bits(a, row, threadIdx.x) : 0;
    int i = pair * a.blocks + rank, page = tiles.page, next_page = tiles.next;
    index::PackedShare key;
    const auto fetch = [&] {
        key = index::NO_KEY;
        if ((!RARE || a.packed) && page >= 0)
            key = index::fetch_packed(index::key_at(a, page, i, half, g, index::PACKED_BYTES), t);
    };
    const auto bring = [&] {
        uint32_t b[16];
        if (!RARE || a.packed || page < 0) index::unpack(b, key);
        else index::load_plain(b, index::key_at(a, page, i, half, g, index::PLAIN_BYTES), t);
#pragma unroll
        for (int k = 0; k < 4; ++k)
            shared.keys[warp][k][lane] = make_uint4(b[4 * k], b[4 * k + 1], b[4 * k + 2], b[4 * k + 3]);
    };
    fetch();
    bool first = true;
#pragma unroll 1
    for (int of_first = rank; of_first * ENTRIES < n; of_first += stride) {  // whoever has no tile meets the others
        bring();  // at first while heads are on their way; then all have read the keys in front
        if (first) {
            index::treat_started(a, s);
            if (threadIdx.x < 64) s.weights[threadIdx.x] = index::weight_of(a, weight);
            first = false;
        }
        __syncthreads();
        uint32_t b[2][16];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const uint4 x = shared.keys[pair + m * PAIRS][k][lane];
                b[m][4 * k] = x.x, b[m][4 * k + 1] = x.y, b[m][4 * k + 2] = x.z, b[m][4 * k + 3] = x.w;
            }
        const int at = i, after = i + 2 * stride;
        i += stride, page = next_page;
        fetch();
        next_page = after * ENTRIES < n ? static_cast<int>(pages[after / (index::PAGE / ENTRIES)]) : -1;
        uint32_t shares[2][2][2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int mt = 2 * half + k;
            index::head_shares(shares[k], s.heads + mt * (16 * index::ROW_BYTES), s.weights + mt * 16, b, g, t);
        }
        float sum[2][2] = {};
        float4& sums = shared.sums[pair][lane];
        if (half == 0) {
            index::add_shares(sum, shares[0]);
            index::add_shares(sum, shares[1]);
            sums = make_float4(sum[0][0], sum[0][1], sum[1][0], sum[1][1]);
        }
        __syncthreads();
        if (half == 0 || at * ENTRIES >= n) continue;
        sum[0][0] = sums.x, sum[0][1] = sums.y, sum[1][0] = sums.z, sum[1][1] = sums.w;
        index::add_shares(sum, shares[0]);
        index::add_shares(sum, shares[1]);
        index::add_heads(sum);
        put(at * (ENTRIES / 4) + t, index::four_keys(sum, n - at * ENTRIES - 4 * t));
    }
}

}  // namespace dsv4::persistent::pairs
