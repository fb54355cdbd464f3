// What lies between the products, in one pass each: norms and gates.

#include <cmath>

#include "simd.h"

// out = x / sqrt(mean(x²) + eps) * weight. x, out: [rows, columns]
extern "C" void warmgate_rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t columns, float eps) {
    for (int64_t r = 0; r < rows; r++, x += columns, out += columns) {
        vf squares = {}, more = {};
        int64_t c = 0;
        for (; c + 2 * LANES <= columns; c += 2 * LANES) {
            const vf a = load(x + c), b = load(x + c + LANES);
            squares += a * a;
            more += b * b;
        }
        float total = sum(squares + more);
        for (; c < columns; c++) total += x[c] * x[c];
        const float factor = 1.0f / std::sqrt(total / static_cast<float>(columns) + eps);
        for (c = 0; c + LANES <= columns; c += LANES) store(out + c, load(x + c) * factor * load(weight + c));
        for (; c < columns; c++) out[c] = x[c] * factor * weight[c];
    }
}

// out = silu(gate) * up. both: [rows, 2 * columns], gate before up; out: [rows, columns]
extern "C" void warmgate_gate(const float* both, float* out, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r++, both += 2 * columns, out += columns) {
        const float *gate = both, *up = both + columns;
        int64_t c = 0;
        for (; c + LANES <= columns; c += LANES) {
            const vf x = load(gate + c);
            store(out + c, x / (vexp(-x < 88.0f ? -x : splat(88.0f)) + 1.0f) * load(up + c));
        }
        for (; c < columns; c++) out[c] = gate[c] / (1.0f + std::exp(-gate[c])) * up[c];
    }
}
