// A quantised matrix as library.py lays it out, for products y = x Wᵀ + b with float32 activations.
//
// Rows of W (outputs) come in blocks of 64, the last one padded; a lane is a row, so that activations are broadcast and
// nothing is summed across lanes. Within a block columns follow one another:
//
//   INTEGER4        [block][column / 8][row] 4 bytes; byte b: column b in the low half, column 4 + b in the high one
//   INTEGER8        [block][column / 4][row][column % 4] bytes
//   TABLE4          [block][column / 8][row] uint32, code of column c in bits 4 (c % 8)
//   E4M3, E5M2      [block][column][row] bytes
//
// w = scale * (code - zero) or scale * code + minimum. Scale, zero and minimum belong to `group` columns of a row:
// [block][group][row]. Without offsets every integer has the same zero: 8 or 128.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

constexpr int ROWS = 64;            // rows a block
constexpr int VECS = WIDE ? 4 : 2;  // vectors of rows in registers at once
constexpr int SPAN = VECS * LANES;  // rows in registers at once

enum Kind { INTEGER4 = 0, INTEGER8 = 1, TABLE4 = 2, E4M3 = 3, E5M2 = 4 };
enum Offset { NONE = 0, ZERO = 1, MINIMUM = 2 };

extern "C" struct Matrix {
    const void* codes;
    const void* scale;     // float, or half when is_half
    const void* offset;    // as scale; null without offsets
    const float* table;    // TABLE4: 16 values
    const int32_t* order;  // null, or which activation belongs to each column
    const float* bias;     // null, or [rows]
    int64_t rows, columns, group;
    int32_t kind, offset_kind, is_half;
    int32_t activation_bits;  // integers: 16 = nearly float32, 8 = one scale a token
    float activation_scale;   // with 8 bits: 0 = each token's own
};

static inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
static inline int64_t blocks_of(const Matrix& m) { return (m.rows + ROWS - 1) / ROWS; }
static inline int64_t groups_of(const Matrix& m) { return (m.columns + m.group - 1) / m.group; }

static inline vf load_factor(const Matrix& m, const void* factors, int64_t at) {
    return m.is_half ? load_half(static_cast<const uint16_t*>(factors) + at) : load(static_cast<const float*>(factors) + at);
}

// Writes one block's results for one token.
static inline void finish(const Matrix& m, const float* out, int64_t first, int64_t count, float* y) {
    const int64_t end = std::min(first + count, m.rows);
    for (int64_t r = first; r < end; r++) y[r] = out[r - first] + (m.bias ? m.bias[r] : 0.0f);
}

// Activations in the matrix's column order, padded with zeros to a multiple of 8: [tokens][stride].
struct Activations {
    const float* x;
    int64_t stride;
    std::vector<float> own;

    Activations(const Matrix& m, const float* given, int64_t tokens) : x(given), stride(round_up(m.columns, 8)) {
        if (m.order == nullptr && stride == m.columns) return;
        own.assign(tokens * stride, 0.0f);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t c = 0; c < m.columns; c++)
                own[t * stride + c] = given[t * m.columns + (m.order ? m.order[c] : c)];
        x = own.data();
    }
};

void product_integers(const Matrix& m, const float* x, float* y, int64_t tokens, int threads);
void product_floats(const Matrix& m, const float* x, float* y, int64_t tokens, int threads);
