// y += B A x for rows with different adapters (BGMV of Punica, Chen et al. 2023, on a CPU): matrices are read from the
// pool where they are, once for all rows of one adapter. See replicas/engine/lora/compiled.py for the arguments.
#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

using ::load;

struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };

inline vf load(const Half* p) { return load_half(&p->bits); }

inline vf load(const Brain* p) {
#if WIDE
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#else
    return (vf)(__builtin_convertvector(*reinterpret_cast<const vh*>(p), vu) << 16);
#endif
}

// Pairs first: adding one lane after another takes four times as long.
inline float total_of(vf x) {
    float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

inline float load_one(const float* p) { return *p; }
inline float load_one(const Half* p) { return half_to_float(p->bits); }
inline float load_one(const Brain* p) {
    const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline void store_one(float* p, float x) { *p = x; }
inline void store_one(Half* p, float x) { p->bits = float_to_half(x); }
inline void store_one(Brain* p, float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

constexpr int MAX_PARTS = 3;
constexpr int GROUP = 8;  // matrix rows that are read side by side
constexpr int ROWS = 4;   // rows of x that share a pass over them

struct Step {
    const int32_t* rows;         // of the batch, those of one adapter together
    const int32_t* row_ends;     // [num_segments]
    const int32_t* pages;        // of all adapters
    const int32_t* page_ends;    // [num_segments]
    int64_t num_segments;
    int64_t in_features;
    int64_t num_parts;
    int64_t starts[MAX_PARTS];   // columns of y
    int64_t widths[MAX_PARTS];
    int32_t kind;                // of x and y
    int32_t matrix_kind;
    int64_t threads;
};

// s[i * stride + k] = x[i] · a[k] for M rows and K matrix rows.
template <int M, int K, class W>
inline void shrink(const float* const* x, const W* const* a, int64_t n, float* s, int64_t stride) {
    vf total[M][K];
    for (int i = 0; i < M; i++)
        for (int k = 0; k < K; k++) total[i][k] = splat(0.0f);
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        vf w[K];
        for (int k = 0; k < K; k++) w[k] = load(a[k] + j);
        for (int i = 0; i < M; i++) {
            const vf v = load(x[i] + j);
            for (int k = 0; k < K; k++) total[i][k] += v * w[k];
        }
    }
    for (int i = 0; i < M; i++)
        for (int k = 0; k < K; k++) {
            float rest = 0.0f;
            for (int64_t t = j; t < n; t++) rest += x[i][t] * load_one(a[k] + t);
            s[i * stride + k] = total_of(total[i][k]) + rest;
        }
}

// y[i] += Σ_k s[i * stride + k * step] b[k] for M rows and K matrix rows.
template <int M, int K, class W>
inline void expand(float* const* y, const W* const* b, int64_t n, const float* s, int64_t stride, int64_t step) {
    vf factor[M][K];
    const W* own[K];  // copies: for all the compiler knows, y could be where the pointers are
    for (int k = 0; k < K; k++) own[k] = b[k];
    for (int i = 0; i < M; i++)
        for (int k = 0; k < K; k++) factor[i][k] = splat(s[i * stride + k * step]);
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        vf w[K];
        for (int k = 0; k < K; k++) w[k] = load(own[k] + j);
        for (int i = 0; i < M; i++) {
            vf v = load(y[i] + j);
            for (int k = 0; k < K; k++) v += factor[i][k] * w[k];
            store(y[i] + j, v);
        }
    }
    for (; j < n; j++)
        for (int i = 0; i < M; i++)
            for (int k = 0; k < K; k++) y[i][j] += s[i * stride + k * step] * load_one(b[k] + j);
}

template <int M, class W>
void shrink_all(const float* const* x, const W* const* a, int64_t count, int64_t n, float* s, int64_t stride) {
    int64_t k = 0;
    for (; k + GROUP <= count; k += GROUP) shrink<M, GROUP>(x, a + k, n, s + k, stride);
    for (; k < count; k++) shrink<M, 1>(x, a + k, n, s + k, stride);
}

template <int M, class W>
void expand_all(float* const* y, const W* const* b, int64_t count, int64_t n, const float* s, int64_t stride,
                int64_t step) {
    int64_t k = 0;
    for (; k + GROUP <= count; k += GROUP) expand<M, GROUP>(y, b + k, n, s + k * step, stride, step);
    for (; k < count; k++) expand<M, 1>(y, b + k, n, s + k * step, stride, step);
}

// Rows as float: themselves, or a copy in `space`.
inline const float* widened(const float* p, int64_t, float*) { return p; }
template <class X>
inline const float* widened(const X* p, int64_t n, float* space) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) store(space + j, load(p + j));
    for (; j < n; j++) space[j] = load_one(p + j);
    return space;
}
inline float* opened(float* p, int64_t, float*) { return p; }
template <class X>
inline float* opened(X* p, int64_t n, float* space) {
    return const_cast<float*>(widened(p, n, space));
}
inline void closed(float*, int64_t, const float*) {}
template <class X>
inline void closed(X* p, int64_t n, const float* values) {
    for (int64_t j = 0; j < n; j++) store_one(p + j, values[j]);
}

// What one thread works in.
template <class W>
struct Space {
    std::vector<float> shrunk, copies;
    std::vector<const W*> matrix;
    int64_t widest = 0;

    void reserve(const Step& step, int64_t rank) {
        widest = step.in_features;
        for (int64_t p = 0; p < step.num_parts; p++) widest = std::max(widest, step.widths[p]);
        shrunk.resize(ROWS * rank * step.num_parts);
        copies.resize(ROWS * widest);
        matrix.resize(rank * step.num_parts);
    }
    float* copy(int i) { return copies.data() + i * widest; }
};

template <class X, class W>
struct Work {
    const Step& step;
    const X* x;
    int64_t x_stride;
    X* y;
    int64_t y_stride;
    const W* a;
    const W* const* b;

    template <int M>
    void rows(const int32_t* rows, const int32_t* pages, int64_t rank, Space<W>& space) const {
        const int64_t n = step.in_features, parts = step.num_parts, count = rank * parts;
        float* s = space.shrunk.data();
        const float* from[M];
        for (int i = 0; i < M; i++) from[i] = widened(x + rows[i] * x_stride, n, space.copy(i));
        for (int64_t k = 0; k < count; k++) space.matrix[k] = a + (pages[k / parts] * parts + k % parts) * n;
        shrink_all<M>(from, space.matrix.data(), count, n, s, count);
        for (int64_t p = 0; p < parts; p++) {
            const int64_t width = step.widths[p];
            float* to[M];
            for (int i = 0; i < M; i++) to[i] = opened(y + rows[i] * y_stride + step.starts[p], width, space.copy(i));
            for (int64_t k = 0; k < rank; k++) space.matrix[k] = b[p] + pages[k] * width;
            expand_all<M>(to, space.matrix.data(), rank, width, s + p, count, parts);
            for (int i = 0; i < M; i++) closed(y + rows[i] * y_stride + step.starts[p], width, to[i]);
        }
    }

    void segment(int64_t g) const {
        thread_local Space<W> space;
        int64_t row = g ? step.row_ends[g - 1] : 0;
        const int64_t end = step.row_ends[g], first = g ? step.page_ends[g - 1] : 0;
        const int64_t rank = step.page_ends[g] - first;
        const int32_t* pages = step.pages + first;
        space.reserve(step, rank);
        for (; row + 4 <= end; row += 4) rows<4>(step.rows + row, pages, rank, space);
        for (; row + 2 <= end; row += 2) rows<2>(step.rows + row, pages, rank, space);
        for (; row < end; row++) rows<1>(step.rows + row, pages, rank, space);
    }
};

template <class X, class W>
void run(const Step* step, const void* x, int64_t x_stride, void* y, int64_t y_stride, const void* const* matrices) {
    const Work<X, W> work{*step, static_cast<const X*>(x), x_stride, static_cast<X*>(y), y_stride,
                          static_cast<const W*>(matrices[0]), reinterpret_cast<const W* const*>(matrices + 1)};
#pragma omp parallel for schedule(dynamic) num_threads(step->threads) if (step->threads > 1)
    for (int64_t g = 0; g < step->num_segments; g++) work.segment(g);
}

template <class X>
void run_kind(const Step* step, const void* x, int64_t x_stride, void* y, int64_t y_stride,
              const void* const* matrices) {
    switch (step->matrix_kind) {
        case FLOAT32: return run<X, float>(step, x, x_stride, y, y_stride, matrices);
        case BFLOAT16: return run<X, Brain>(step, x, x_stride, y, y_stride, matrices);
        case FLOAT16: return run<X, Half>(step, x, x_stride, y, y_stride, matrices);
    }
}

}  // namespace

// x [., in_features] and y [., out_features] lie in rows of their strides; matrices: A, then B of each part.
extern "C" void warmgate_lora(const Step* step, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                              const void* const* matrices) {
    switch (step->kind) {
        case FLOAT32: return run_kind<float>(step, x, x_stride, y, y_stride, matrices);
        case BFLOAT16: return run_kind<Brain>(step, x, x_stride, y, y_stride, matrices);
        case FLOAT16: return run_kind<Half>(step, x, x_stride, y, y_stride, matrices);
    }
}
