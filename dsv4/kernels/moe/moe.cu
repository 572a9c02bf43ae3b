// moe: align, first projection with SwiGLU, second projection, weighted sum; all in one launch for up to eight tokens.
// Which kernels multiply depends on the number of tokens alone; how much each has to do is known on the device only.
#include <dsv4/moe_align.cuh>
#include <dsv4/moe_few.cuh>
#include <dsv4/moe_stream.cuh>
#include <dsv4/moe_tiles.cuh>

using namespace dsv4;
using namespace dsv4::moe;

namespace {

enum Phase : int { ALIGN = 1, GATE_UP = 2, DOWN = 4 };  // the codes of dsv4/kernels/moe/launch.py

// out = (sum over the token's places, rising) + shared, rounded once (T bf16) or not at all (float); a thread has 8
// columns of a token. What several places hold is asked for at once.
template <typename T>
__global__ void __launch_bounds__(128) moe_combine(const bf16* down, const int* places, const T* shared,
                                                   int64_t shared_row, T* out, int topk, int width, bool wide) {
    constexpr int AT_ONCE = 8;
    wait_for_previous();
    const int64_t token = blockIdx.x;
    const int column = (blockIdx.y * 128 + threadIdx.x) * 8;
    if (column >= width) return;
    float sum[8] = {}, added[8];
    load<8>(shared + token * shared_row + column, added, width - column, wide);
    for (int first = 0; first < topk; first += AT_ONCE) {
        int place[AT_ONCE];
        float one[AT_ONCE][8];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) place[k] = first + k < topk ? places[token * topk + first + k] : -1;
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
            if (place[k] >= 0)
                load<8>(down + static_cast<int64_t>(place[k]) * width + column, one[k], width - column, wide);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
#pragma unroll
            for (int i = 0; i < 8; ++i) sum[i] += place[k] >= 0 ? one[k][i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += added[i];
    store<8>(out + token * width + column, sum, width - column, wide);
}

struct Device {
    int processors, shared_per_processor, shared_per_block;
};

cudaError_t describe(Device& device) {
    int index;
    if (auto e = cudaGetDevice(&index)) return e;
    if (auto e = cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index)) return e;
    const auto per_processor = cudaDevAttrMaxSharedMemoryPerMultiprocessor;
    if (auto e = cudaDeviceGetAttribute(&device.shared_per_processor, per_processor, index)) return e;
    return cudaDeviceGetAttribute(&device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
}

template <bool FIRST, int SLICES, int BLOCKS, int TILES>
cudaError_t run_stream(const Device& device, const Job& job, int64_t pairs, bool planned, cudaStream_t stream_) {
    constexpr int PER_PROCESSOR = 16 / SLICES, OWN = 2 * TILES * SLICES * 512 + 256 + 1024;  // the last: the device's
    const auto kernel = stream<FIRST, SLICES, BLOCKS, TILES>;
    const int stage = TILES * job.blocks * w4::BLOCK_BYTES;
    const int room = min(device.shared_per_processor / PER_PROCESSOR, device.shared_per_block + 1024) - OWN;
    const int stages = min(room / stage, MAX_STAGES);
    if (stages < 1) return cudaErrorInvalidConfiguration;
    const int bytes = stages * stage;
    if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return e;
    if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100)) return e;
    const int64_t steps = (job.rows + TILES - 1) / TILES;
    const int64_t blocks = min(pairs * steps, static_cast<int64_t>(device.processors) * PER_PROCESSOR);
    return launch_dependent(kernel, blocks, 1, SLICES * 32, bytes, stream_, job, stages, planned);
}

// A step is long enough to hide what its end costs: two tiles of few columns.
template <bool FIRST>
cudaError_t choose_stream(const Device& device, const Job& job, int64_t pairs, bool planned, cudaStream_t stream_) {
    if (job.blocks <= 16) return run_stream<FIRST, 8, 2, 2>(device, job, pairs, planned, stream_);
    if (job.blocks <= 32) return run_stream<FIRST, 8, 4, 1>(device, job, pairs, planned, stream_);
    if (job.blocks <= 64) return run_stream<FIRST, 8, 8, 1>(device, job, pairs, planned, stream_);
    return run_stream<FIRST, 16, 8, 1>(device, job, pairs, planned, stream_);
}

// Shared memory of the kernels for few tokens, and who takes which tiles. False: the shared memory is too small, or the
// tiles are too many to be told apart as floats, and the streamed form takes over.
bool fit_few(const Device& device, Few& f, size_t& bytes) {
    const int pairs = f.tokens * f.first.topk, least = 2 * FEW_WARPS, most = FEW_WARPS * MOST_CHUNKS;
    if (max(f.first.rows, f.second.rows) >= MOST_ITEMS / FEW_PAIRS) return false;
    f.of_block = {f.second.rows / device.processors, f.second.rows % device.processors};
    f.room = min(pairs, max((100 << 10) / stride_of(f.second.blocks), TOKENS));
    f.staged = max(f.tokens * stride_of(f.first.blocks), f.room * stride_of(f.second.blocks));
    const auto each = [&](int rows) { return (rows + device.processors - 1) / device.processors; };
    const int tiles = each(f.second.rows), first_tiles = each(f.first.rows * pairs), cuts = cuts_of(f.first.blocks);
    if (tiles * pairs <= FEW_WARPS && f.first.blocks >> cuts > 0)  // and so a warp has one piece of one tile
        f.halvings = first_tiles <= FEW_WARPS / 4 ? 2 : first_tiles <= FEW_WARPS / 2 ? 1 : 0;
    f.parked = f.halvings == 0 ? 0 : (first_tiles << cuts) * 512;
    const int own = f.staged + max(f.tokens, f.room) * MOST_SLICES * 4 + f.parked + tiles * pairs * 32;
    f.chunks = min((device.shared_per_block - static_cast<int>(sizeof(FewShared)) - 128 - own) / CHUNK, most);
    bytes = static_cast<size_t>(f.chunks) * CHUNK + own;
    return f.chunks >= least;
}

template <bool FIRST, bool SECOND>
cudaError_t run_few(const Device& device, const Few& f, size_t bytes, cudaStream_t stream_) {
    const auto kernel = few<FIRST, SECOND>;
    if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)))
        return e;
    return launch_dependent(kernel, device.processors, 1, FEW_THREADS, bytes, stream_, f);
}

template <bool FIRST>
cudaError_t run_tiles(const Device& device, const Job& job, int64_t rows, int64_t groups, uint16_t* half, float* scale,
                      cudaStream_t stream_) {
    const int room = device.shared_per_block - static_cast<int>(2 * WIDE_TOKENS * sizeof(float));
    const int steps = tiles_bytes(MOST_STEPS) <= room ? MOST_STEPS : LEAST_STEPS, bytes = tiles_bytes(steps);
    if (auto e = cudaFuncSetAttribute(tiles<FIRST>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return e;
    auto e = launch(to_half, rows, 1, 256, 0, 1, stream_, job.x, job.x_row, job.row_scale, job.columns, job.blocks,
                    half, scale);
    if (e != cudaSuccess) return e;
    const int sections = (job.rows + BLOCK_TILES - 1) / BLOCK_TILES;
    int chain = max(128 / job.blocks, 1);  // its first steps wait for memory, so it is long; but not at the end's cost
    while (chain > 1 && groups * sections < static_cast<int64_t>(8) * chain * device.processors) chain /= 2;
    const int64_t blocks = groups * ((sections + chain - 1) / chain);
    return launch(tiles<FIRST>, blocks, 1, TILE_THREADS, bytes, 1, stream_, job, half, scale, chain, steps);
}

}  // namespace

// One projection of all experts. The mirror of its ctypes structure in kernels/moe/launch.py.
struct Projection {
    const uint8_t* tiles;
    const float* alpha;
    const bf16* x;  // of the first by token, of the second by place
    const float* row_scale;
    bf16* to;  // by place
    int64_t x_row;
    int rows, columns;
};

static_assert(sizeof(Projection) == 56, "kernels/moe/launch.py lays it out");

// lists: [4 groups] groups, [T K] pairs, [T K] places, [1] count. The first projection writes what the second reads, if
// not treated in between; the second writes `to`, then `out`. half, scale: scratch of the wide form (group > 8), for
// every row of x, the padded columns of it. arrivals: [2] zeros. Phases that need a plan find the one ALIGN has made.
// Experts first_expert .. first_expert + experts - 1 are here; ids of others are left out.
extern "C" int dsv4_moe(const int64_t* ids, int* lists, int64_t tokens, int topk, int first_expert, int experts,
                        int group, int64_t groups, const Projection* first, const Projection* second,
                        const float* weights, float limit, uint16_t* half, float* scale, const void* shared,
                        int64_t shared_row, void* out, int out_f32, unsigned* arrivals, int phases,
                        cudaStream_t stream_) {
    const int64_t pairs = tokens * topk;
    if (pairs == 0 || second->rows == 0) return cudaSuccess;
    int* places = lists + 4 * groups;
    const Plan plan = {places, places + pairs, reinterpret_cast<Group*>(lists), places + 2 * pairs};
    const auto job_of = [&](const Projection& p) {
        return Job{p.tiles, p.alpha, p.x, p.x_row, p.row_scale, weights, p.to, plan,
                   topk, p.rows, (p.columns + 63) / 64, p.columns, limit};
    };
    const Job gate_up = job_of(*first), down = job_of(*second);
    Device device;
    if (auto e = describe(device)) return e;
    const bool wide = group > TOKENS;
    if (!wide && tokens <= FEW_TOKENS && pairs <= FEW_PAIRS) {
        Few f = {gate_up, down, ids, shared, shared_row, out, arrivals, static_cast<int>(tokens), first_expert,
                 experts, out_f32};
        size_t bytes;
        if (fit_few(device, f, bytes)) {
            if (phases & GATE_UP && phases & DOWN) return run_few<true, true>(device, f, bytes, stream_);
            if (phases & GATE_UP) return run_few<true, false>(device, f, bytes, stream_);
            return phases & DOWN ? run_few<false, true>(device, f, bytes, stream_) : cudaSuccess;
        }
    }
    cudaError_t e = cudaSuccess;
    if (phases & ALIGN) {
        const size_t bytes = (2 + ALIGN_WARPS / 2) * experts * sizeof(int);
        e = cudaFuncSetAttribute(align, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        const int64_t blocks = (pairs + ALIGN_THREADS - 1) / ALIGN_THREADS;
        if (e == cudaSuccess)
            e = launch_dependent(align, blocks, 1, ALIGN_THREADS, bytes, stream_, ids, pairs, topk, first_expert,
                                 experts, group, plan);
    }
    if (e == cudaSuccess && phases & GATE_UP)
        e = wide ? run_tiles<true>(device, gate_up, tokens, groups, half, scale, stream_)
                 : choose_stream<true>(device, gate_up, pairs, false, stream_);
    if (e == cudaSuccess && phases & DOWN) {
        e = wide ? run_tiles<false>(device, down, pairs, groups, half, scale, stream_)
                 : choose_stream<false>(device, down, pairs, phases & GATE_UP, stream_);
        const int width = 16 * down.rows;
        const bool whole = shared_row % 8 == 0 && aligned16(shared) && aligned16(out);
        const int across = (width + 1023) / 1024;
        if (e == cudaSuccess && out_f32)
            e = launch_dependent(moe_combine<float>, tokens, across, 128, 0, stream_, down.out, plan.places,
                                 static_cast<const float*>(shared), shared_row, static_cast<float*>(out), topk, width,
                                 whole);
        else if (e == cudaSuccess)
            e = launch_dependent(moe_combine<bf16>, tokens, across, 128, 0, stream_, down.out, plan.places,
                                 static_cast<const bf16*>(shared), shared_row, static_cast<bf16*>(out), topk, width,
                                 whole);
    }
    return e;
}
