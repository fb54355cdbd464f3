// The products' entry: x [tokens, columns], y [tokens, rows], both dense float32.

#include "matrix.h"

extern "C" void warmgate_linear(const Matrix* m, const float* x, float* y, int64_t tokens, int threads) {
    if (m->kind == INTEGER4 || m->kind == INTEGER8)
        product_integers(*m, x, y, tokens, threads);
    else
        product_floats(*m, x, y, tokens, threads);
}
