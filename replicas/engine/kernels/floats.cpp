// Weights that are no integers: four-bit codes of a table (NF4) and 8-bit floats, times float32 activations.
// One token multiplies codes as they stream by; several share a panel of W unpacked to float32.

#include "matrix.h"

namespace {

constexpr int TOKENS = 6;           // tokens in registers at once
constexpr int64_t PANEL = 256;      // columns unpacked at once: 64 KiB of float32

// Up to so many tokens, codes are looked up again for each: cheaper than a panel.
template <int KIND>
constexpr int64_t FEW = KIND == TABLE4 ? 5 : 2;

template <int KIND>
int64_t block_bytes(const Matrix& m) {
    return KIND == TABLE4 ? round_up(m.columns, 8) * ROWS / 2 : m.columns * ROWS;
}

template <int KIND>
vf from_byte(const uint8_t* p) {
    return KIND == E4M3 ? from_e4m3(p) : from_e5m2(p);
}

// acc += codes times activations over columns [first, last), for SPAN rows. Two sets of sums, for the latency.
template <int KIND>
void add_codes(const Matrix& m, const uint8_t* codes, const float* x, int64_t first, int64_t last, vf* acc) {
    if (KIND == TABLE4) {
        for (int64_t c = first; c < last; c += 8) {
            vu word[VECS];
            for (int v = 0; v < VECS; v++) prefetch(codes + (c / 8 * ROWS + v * LANES) * 4);
            for (int v = 0; v < VECS; v++)
                word[v] = *reinterpret_cast<const vu*>(codes + (c / 8 * ROWS + v * LANES) * 4);
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) {
                const vf xs = splat(x[c + k]);
                for (int v = 0; v < VECS; v++) acc[k % 2 * VECS + v] += look_up(m.table, word[v] >> (4 * k)) * xs;
            }
        }
        return;
    }
    for (int64_t c = first; c < last; c++) {
        const vf xs = splat(x[c]);
        prefetch(codes + c * ROWS);
        for (int v = 0; v < VECS; v++) acc[c % 2 * VECS + v] += from_byte<KIND>(codes + c * ROWS + v * LANES) * xs;
    }
}

template <int KIND>
void one_token(const Matrix& m, const float* x, float* y, int64_t block) {
    const int64_t groups = groups_of(m);
    for (int row = 0; row < ROWS; row += SPAN) {
        const uint8_t* codes = static_cast<const uint8_t*>(m.codes) + block * block_bytes<KIND>(m);
        vf total[VECS] = {};
        for (int64_t g = 0; g < groups; g++) {
            vf acc[2 * VECS] = {};
            const int64_t last = std::min((g + 1) * m.group, m.columns);
            add_codes<KIND>(m, codes + (KIND == TABLE4 ? row * 4 : row), x, g * m.group, last, acc);
            for (int v = 0; v < VECS; v++) {
                const int64_t at = (block * groups + g) * ROWS + row + v * LANES;
                total[v] += load_factor(m, m.scale, at) * (acc[v] + acc[VECS + v]);
            }
        }
        alignas(64) float out[SPAN];
        for (int v = 0; v < VECS; v++) store(out + v * LANES, total[v]);
        finish(m, out, block * ROWS + row, SPAN, y);
    }
}

// Columns [first, last) of a block as float32: [last - first][64].
template <int KIND>
void unpack(const Matrix& m, int64_t block, int64_t first, int64_t last, float* panel) {
    const int64_t groups = groups_of(m);
    const uint8_t* codes = static_cast<const uint8_t*>(m.codes) + block * block_bytes<KIND>(m);
    for (int row = 0; row < ROWS; row += LANES)
        for (int64_t c = first; c < last;) {
            const int64_t g = c / m.group, end = std::min(last, (g + 1) * m.group);
            const vf scale = load_factor(m, m.scale, (block * groups + g) * ROWS + row);
            for (; c < end; c++) {
                const uint8_t* at = codes + (KIND == TABLE4 ? (c / 8 * ROWS + row) * 4 : c * ROWS + row);
                const vf value = KIND == TABLE4
                                     ? look_up(m.table, *reinterpret_cast<const vu*>(at) >> static_cast<uint32_t>(4 * (c % 8)))
                                     : from_byte<KIND>(at);
                store(panel + (c - first) * ROWS + row, value * scale);
            }
        }
}

// out[token][row] += x[token][column] * panel[column][row] for N tokens and SPAN rows.
template <int N>
void multiply(const float* x, int64_t stride, const float* panel, int64_t columns, float* out) {
    vf acc[N][VECS];
    for (int t = 0; t < N; t++)
        for (int v = 0; v < VECS; v++) acc[t][v] = load(out + t * ROWS + v * LANES);
    for (int64_t c = 0; c < columns; c++) {
        vf w[VECS];
        for (int v = 0; v < VECS; v++) w[v] = load(panel + c * ROWS + v * LANES);
        for (int t = 0; t < N; t++) {
            const vf xs = splat(x[t * stride + c]);
            for (int v = 0; v < VECS; v++) acc[t][v] += w[v] * xs;
        }
    }
    for (int t = 0; t < N; t++)
        for (int v = 0; v < VECS; v++) store(out + t * ROWS + v * LANES, acc[t][v]);
}

void multiply_any(int64_t tokens, const float* x, int64_t stride, const float* panel, int64_t columns, float* out) {
    for (int row = 0; row < ROWS; row += SPAN) switch (tokens) {
            case 1: multiply<1>(x, stride, panel + row, columns, out + row); break;
            case 2: multiply<2>(x, stride, panel + row, columns, out + row); break;
            case 3: multiply<3>(x, stride, panel + row, columns, out + row); break;
            case 4: multiply<4>(x, stride, panel + row, columns, out + row); break;
            case 5: multiply<5>(x, stride, panel + row, columns, out + row); break;
            default: multiply<TOKENS>(x, stride, panel + row, columns, out + row);
        }
}

template <int KIND>
void many_tokens(const Matrix& m, const Activations& in, float* y, int64_t tokens, int64_t block) {
    thread_local std::vector<float> panel(PANEL * ROWS), out;
    out.assign(tokens * ROWS, 0.0f);
    for (int64_t first = 0; first < m.columns; first += PANEL) {
        const int64_t last = std::min(m.columns, first + PANEL);
        unpack<KIND>(m, block, first, last, panel.data());
        for (int64_t t = 0; t < tokens; t += TOKENS)
            multiply_any(std::min<int64_t>(TOKENS, tokens - t), in.x + t * in.stride + first, in.stride, panel.data(),
                         last - first, out.data() + t * ROWS);
    }
    for (int64_t t = 0; t < tokens; t++) finish(m, out.data() + t * ROWS, block * ROWS, ROWS, y + t * m.rows);
}

template <int KIND>
void product(const Matrix& m, const float* x, float* y, int64_t tokens, int threads) {
    const Activations in(m, x, tokens);
    const int64_t blocks = blocks_of(m);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        if (tokens > FEW<KIND>) {
            many_tokens<KIND>(m, in, y, tokens, block);
            continue;
        }
        for (int64_t t = 0; t < tokens; t++) one_token<KIND>(m, in.x + t * in.stride, y + t * m.rows, block);
    }
}

}  // namespace

void product_floats(const Matrix& m, const float* x, float* y, int64_t tokens, int threads) {
    switch (m.kind) {
        case TABLE4: return product<TABLE4>(m, x, y, tokens, threads);
        case E4M3: return product<E4M3>(m, x, y, tokens, threads);
        default: return product<E5M2>(m, x, y, tokens, threads);
    }
}
