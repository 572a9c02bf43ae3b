// embed: one block per row copies it to every stream.
#include <dsv4/dependent.cuh>

namespace {

template <typename C>
__global__ void embed(const int64_t* tokens, const C* table, C* h, int64_t vocab, int n, int streams) {
    dsv4::take_turn();
    const int64_t row = blockIdx.x, token = tokens[row];
    const bool known = token >= 0 && token < vocab;
    C filler;
    memset(&filler, token == -1 ? 0 : 0xFF, sizeof(C));  // padding; NaN in BF16 and in float32
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < n; i += gridDim.y * blockDim.x) {
        const C chunk = known ? table[token * n + i] : filler;
        for (int j = 0; j < streams; ++j) h[(row * streams + j) * n + i] = chunk;
    }
}

template <typename C>
static cudaError_t run(const int64_t* tokens, const void* table, void* h, int64_t rows, int64_t vocab, int bytes,
                       int streams, cudaStream_t stream) {
    const int n = bytes / sizeof(C);
    return dsv4::launch_dependent(embed<C>, rows, (n + 255) / 256, 256, 0, stream, tokens, static_cast<const C*>(table),
                                  static_cast<C*>(h), vocab, n, streams);
}

}  // namespace

extern "C" int dsv4_embed(const int64_t* tokens, const void* table, void* h, int64_t rows, int64_t vocab, int row_bytes,
                          int streams, cudaStream_t stream) {
    if (rows == 0 || row_bytes == 0) return cudaSuccess;
    const bool wide = row_bytes % 16 == 0 && dsv4::aligned16(table) && dsv4::aligned16(h);
    return wide ? run<uint4>(tokens, table, h, rows, vocab, row_bytes, streams, stream)
                : run<uint16_t>(tokens, table, h, rows, vocab, row_bytes, streams, stream);
}
