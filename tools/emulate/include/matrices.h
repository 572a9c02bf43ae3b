// What a warp's lanes do together with matrices in their registers: mma, ldmatrix, movmatrix.
#pragma once
#include <copies.h>
#include <numbers.h>

namespace emulate {

// D = A B + C of 16 x 8 x 16; the registers are those of the PTX manual.
template <typename Value>
inline void multiply_together(Thread* lanes, unsigned all, Value value) {
    if (all != 0xffffffffu) fail("a product without all 32 lanes");
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const uint32_t* given = lanes[lane].given;
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i)
            for (int half = 0; half < 2; ++half)
                a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = value(static_cast<uint16_t>(given[i] >> 16 * half));
        for (int i = 0; i < 2; ++i)
            for (int half = 0; half < 2; ++half)
                b[2 * t + half + i * 8][g] = value(static_cast<uint16_t>(given[4 + i] >> 16 * half));
    }
    float d[16][8] = {};
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            lanes[lane].taken[i] =
                bits_of(d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] + float_of(lanes[lane].given[6 + i]));
}

template <typename Value>
inline void product(float* const (&c)[4], const uint32_t (&operands)[6], const char* what, Place at, Value value) {
    std::memcpy(current->given, operands, sizeof operands);
    for (int i = 0; i < 4; ++i) current->given[6 + i] = bits_of(*c[i]);
    together(0xffffffffu, what, at, [&](Thread* lanes, unsigned all) { multiply_together(lanes, all, value); });
    for (int i = 0; i < 4; ++i) *c[i] = float_of(current->taken[i]);
}

// Four matrices of 8 x 8 numbers of 16 bits; lane 8 i + r says where row r of matrix i lies.
inline void load_four(uint32_t* const (&r)[4], uint32_t address, bool transposed, const char* what, Place at) {
    current->given[0] = address;
    together(0xffffffffu, what, at, [=](Thread* lanes, unsigned) {
        uint16_t found[32][8];
        for (int lane = 0; lane < 32; ++lane)
            std::memcpy(found[lane], shared_at(*lanes->warp->block, lanes[lane].given[0], 16), 16);
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4, column = lane % 4 * 2;
                lanes[lane].taken[i] = transposed ? pair(found[8 * i + column][row], found[8 * i + column + 1][row])
                                                  : pair(found[8 * i + row][column], found[8 * i + row][column + 1]);
            }
    });
    for (int i = 0; i < 4; ++i) *r[i] = current->taken[i];
}

inline uint32_t transposed(uint32_t value, Place at) {
    current->given[0] = value;
    together(0xffffffffu, "movmatrix", at, [](Thread* lanes, unsigned) {
        const auto element = [&](int row, int column) {
            return static_cast<uint16_t>(lanes[4 * row + column / 2].given[0] >> 16 * (column % 2));
        };
        for (int lane = 0; lane < 32; ++lane) {
            const int row = lane / 4, column = lane % 4 * 2;
            lanes[lane].taken[0] = pair(element(column, row), element(column + 1, row));
        }
    });
    return current->taken[0];
}

}  // namespace emulate
