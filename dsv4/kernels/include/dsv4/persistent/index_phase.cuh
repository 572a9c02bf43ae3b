// INDEX: index_topk of a decode step's rows, each by a group of blocks: every block scores a part of the entries, then finds
// the threshold of all of them and writes its part of the selection.
#pragma once
#include <dsv4/index_score.cuh>
#include <dsv4/index_select.cuh>
#include <dsv4/persistent/meeting.cuh>
#include <dsv4/persistent/memory.cuh>

namespace dsv4::persistent {

// What the blocks of a group show each other of a row.
struct IndexScores {
    uint64_t fours[index::TOGETHER / 4];  // keys
    uint64_t spans[GROUP * WARPS];        // of each warp's keys
};

struct Index {
    index::Arguments of;
    IndexScores* scores;  // [rows]
};

struct IndexWork {
    index::Heads<4> heads;
    index::Selection<THREADS> selection;
};

static __device__ __forceinline__ void index_phase(int turn, Meetings& meetings) {
    const index::Arguments& a = payload<Index>(turn).of;
    const int groups = gridDim.x / GROUP, group = blockIdx.x / GROUP, rank = blockIdx.x % GROUP;
    if (group >= groups) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    IndexWork& s = work<IndexWork>();
    for (int row = group; row < a.rows; row += groups) {
        IndexScores& shown = payload<Index>(turn).scores[row];
        index::clear_heads(a, s.heads);
        index::clear(s.selection);
        // Warps that have no heads to treat are the first to get entries.
        const index::Row r = index::score_row<4, WARPS>(a, s.heads, row, rank, warp ^ WARPS / 2, [&](int at, uint64_t four) {
            if (lane < 4) shown.fours[at] = four;
        });
        if (r.n == 0) {
            index::take_all(a, row, rank * THREADS + threadIdx.x, GROUP * THREADS);
            continue;
        }
        const uint64_t span = index::span_of(r.low, r.high);
        if (lane == 0) shown.spans[rank * WARPS + warp] = span;
        index::Share<THREADS> share(index::pages_of(a, row), r.n, rank, GROUP);
        meetings.of_group();
        share.take(shown.fours, r.n);
        index::select(s.selection, share, index::whole_span(shown.spans, GROUP * WARPS), a.out + row * a.width, a.topk);
    }
}

// scores: IndexScores for each row; 16-byte aligned.
static cudaError_t describe_index(Phase* phase, INDEX_PARAMETERS, void* scratch, int grid) {
    if (rows < 1 || rows > TOKENS || width < 1 || cis == nullptr || heads > 64 || n_pages * index::PAGE > index::TOGETHER ||
        grid < GROUP)
        return cudaErrorInvalidValue;
    Index a = {};
    if (const cudaError_t error = index::arguments(a.of, INDEX_VALUES)) return error;
    a.of.blocks = GROUP, a.scores = static_cast<IndexScores*>(scratch);
    return fill_phase(phase, INDEX, a);
}

}  // namespace dsv4::persistent
