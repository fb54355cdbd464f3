// Integer weights times activations in fixed point.
//
// The processor multiplies unsigned bytes by signed ones, four columns at a time. Weights are the unsigned side. An
// activation is q steps, q = 128 high + low with two signed bytes: 15 bits, the step chosen anew for each segment of at
// most 128 columns, so that results are those of float32 activations but for some 1e-5 of them. With 8-bit activations
// q is one byte, the step a token's (what W8A8 checkpoints ask for).

#include <utility>

#include "matrix.h"

namespace {

constexpr int64_t SEGMENT = 128;  // columns: 255 * 16319 * 128 still fits 31 bits
constexpr int MAX_TOKENS = 6;

// Columns [first, last) of one group.
struct Segment {
    int64_t first, last, group;
};

std::vector<Segment> segments_of(const Matrix& m) {
    std::vector<Segment> found;
    for (int64_t g = 0; g < groups_of(m); g++) {
        const int64_t end = std::min((g + 1) * m.group, m.columns);
        const int64_t step = m.activation_bits == 8 ? m.group : SEGMENT;
        for (int64_t c = g * m.group; c < end; c += step) found.push_back({c, std::min(c + step, end), g});
    }
    return found;
}

struct FixedPoint {
    std::vector<Segment> segments;
    std::vector<int8_t> high, low;  // [tokens][stride]
    std::vector<float> step;        // [tokens][segments]
    std::vector<int32_t> sum;       // of q, [tokens][segments]
    int64_t stride;

    FixedPoint(const Matrix& m, const float* given, int64_t tokens) : segments(segments_of(m)) {
        const Activations in(m, given, tokens);
        const bool wide = m.activation_bits != 8;
        stride = in.stride;
        high.resize(tokens * stride);
        low.resize(wide ? tokens * stride : 0);
        step.resize(tokens * segments.size());
        sum.resize(tokens * segments.size());
        for (int64_t t = 0; t < tokens; t++) {
            const float* x = in.x + t * stride;
            const float all = wide ? 0.0f : m.activation_scale > 0.0f ? m.activation_scale : largest(x, stride) / 127.0f;
            for (size_t s = 0; s < segments.size(); s++) {
                const int64_t first = segments[s].first, padded = round_up(segments[s].last, 8);
                const int64_t at = t * segments.size() + s, to = t * stride + first;
                step[at] = wide ? largest(x + first, padded - first) / 16256.0f : all;
                sum[at] = wide ? split(x + first, padded - first, step[at], &high[to], &low[to])
                               : round(x + first, padded - first, step[at], &high[to]);
            }
        }
    }

    static float largest(const float* x, int64_t count) {
        vf most = {};
        int64_t c = 0;
        for (; c + LANES <= count; c += LANES) {
            const vf v = load(x + c), size = v < 0.0f ? -v : v;
            most = most > size ? most : size;
        }
        float found = 0.0f;
        for (int i = 0; i < LANES; i++) found = std::max(found, most[i]);
        for (; c < count; c++) found = std::max(found, std::fabs(x[c]));
        return found;
    }

    // Adding 1.5 * 2^23 leaves the nearest integer in a float's lowest bits.
    static int32_t nearest(float x) { return static_cast<int32_t>((x + 12582912.0f) - 12582912.0f); }

    static int32_t split(const float* x, int64_t count, float step, int8_t* high, int8_t* low) {
        const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
        int32_t total = 0;
        for (int64_t c = 0; c < count; c++) {
            const int32_t q = nearest(x[c] * inverse), upper = (q + 64) >> 7;
            high[c] = static_cast<int8_t>(upper);
            low[c] = static_cast<int8_t>(q - upper * 128);
            total += q;
        }
        return total;
    }

    static int32_t round(const float* x, int64_t count, float step, int8_t* out) {
        const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
        int32_t total = 0;
        for (int64_t c = 0; c < count; c++) {
            const float bounded = std::min(127.0f, std::max(-128.0f, x[c] * inverse));
            const int32_t q = nearest(bounded);
            out[c] = static_cast<int8_t>(q);
            total += q;
        }
        return total;
    }
};

inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

inline void load_factors(const Matrix& m, const void* factors, int64_t at, vf (&out)[VECS]) {
    if (m.is_half)
        for (int v = 0; v < VECS; v++) out[v] = load_half(static_cast<const uint16_t*>(factors) + at + v * LANES);
    else
        for (int v = 0; v < VECS; v++) out[v] = load(static_cast<const float*>(factors) + at + v * LANES);
}

// acc += the four products of every lane; w unsigned bytes, x four signed ones.
inline vi dot4(vi acc, vi w, const int8_t* x) {
    int32_t word;
    std::memcpy(&word, x, 4);
#if WIDE && defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(word));
#elif !WIDE && defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(word));
#else
    for (int k = 0; k < 4; k++) acc += (vi)(((vu)w >> (8 * k)) & 255u) * static_cast<int32_t>(x[k]);
    return acc;
#endif
}

// f(0), f(1) … f(COUNT - 1), each known to the compiler: sums that loops index would live in memory.
template <class F, size_t... I>
inline void each(F f, std::index_sequence<I...>) {
    (f(std::integral_constant<int, I>()), ...);
}
template <int COUNT, class F>
inline void each(F f) {
    each(f, std::make_index_sequence<COUNT>());
}

// Codes times the high and low parts of N tokens' activations, for SPAN rows.
template <int N>
struct Sums {
    vi high[N][VECS] = {}, low[N][VECS] = {};

    // Adds the columns of one segment, whose codes begin at `codes` and activations at `at`.
    template <int BITS, int PASSES>
    void add(const uint8_t* codes, int64_t count, const FixedPoint& in, int64_t at) {
        constexpr int COLUMNS = 32 / BITS;  // columns in four bytes
        const int8_t *upper = in.high.data() + at, *lower = in.low.data() + at;
        for (; count > 0; count -= COLUMNS, codes += ROWS * 4, upper += COLUMNS, lower += COLUMNS) {
            vi word[VECS];
            each<VECS>([&](auto v) { prefetch(codes + v * LANES * 4); });
            each<VECS>([&](auto v) { word[v] = *reinterpret_cast<const vi*>(codes + v * LANES * 4); });
            each<8 / BITS>([&](auto half) {
                each<VECS>([&](auto v) {
                    const vi w = BITS == 8 ? word[v] : (half ? (vi)((vu)word[v] >> 4) : word[v]) & 0x0f0f0f0f;
                    each<N>([&](auto t) {
                        high[t][v] = dot4(high[t][v], w, upper + t * in.stride + 4 * half);
                        if (PASSES == 2) low[t][v] = dot4(low[t][v], w, lower + t * in.stride + 4 * half);
                    });
                });
            });
        }
    }

    template <int PASSES>
    vi exact(int t, int v) const {
        return PASSES == 2 ? (high[t][v] << 7) + low[t][v] : high[t][v];
    }
};

template <int BITS, int PASSES, int N>
void rows_of(const Matrix& m, const FixedPoint& in, float* y, int64_t token, int64_t block, int row) {
    const int64_t num_segments = in.segments.size(), groups = groups_of(m);
    const int64_t bytes = round_up(m.columns, 8) * ROWS * BITS / 8;
    const uint8_t* codes = static_cast<const uint8_t*>(m.codes) + block * bytes + row * 4;
    const int32_t* sum = in.sum.data() + token * num_segments;
    const float* step = in.step.data() + token * num_segments;
    vf total[N][VECS] = {};
    for (int64_t s = 0; s < num_segments; s++, sum++, step++) {
        const Segment& segment = in.segments[s];
        Sums<N> sums;
        sums.template add<BITS, PASSES>(codes + segment.first * ROWS * BITS / 8, segment.last - segment.first, in,
                                        token * in.stride + segment.first);
        const int64_t at = (block * groups + segment.group) * ROWS + row;
        const auto add = [&](auto value) {  // of one token's exact sums, in floats and before their steps
            each<N>([&](auto t) {
                each<VECS>([&](auto v) { total[t][v] += value(t, v, t * num_segments) * step[t * num_segments]; });
            });
        };
        vf scale[VECS], offset[VECS];
        load_factors(m, m.scale, at, scale);
        if (m.offset_kind == NONE) {
            add([&](auto t, auto v, int64_t i) {
                return scale[v] * to_float(sums.template exact<PASSES>(t, v) - (BITS == 8 ? 128 : 8) * sum[i]);
            });
            continue;
        }
        load_factors(m, m.offset, at, offset);
        if (m.offset_kind == ZERO)
            add([&](auto t, auto v, int64_t i) {
                return scale[v] * (to_float(sums.template exact<PASSES>(t, v)) - offset[v] * float(sum[i]));
            });
        else
            add([&](auto t, auto v, int64_t i) {
                return scale[v] * to_float(sums.template exact<PASSES>(t, v)) + offset[v] * float(sum[i]);
            });
    }
    each<N>([&](auto t) {
        alignas(64) float out[SPAN];
        each<VECS>([&](auto v) { store(out + v * LANES, total[t][v]); });
        finish(m, out, block * ROWS + row, SPAN, y + (token + t) * m.rows);
    });
}

// Tokens that share a pass over a block's codes: as many as keep their sums in registers.
template <int BITS, int PASSES>
void product(const Matrix& m, const FixedPoint& in, float* y, int64_t tokens, int threads) {
    constexpr int TILE = PASSES == 2 ? 3 : MAX_TOKENS;
    const int64_t blocks = blocks_of(m);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; block++)
        for (int row = 0; row < ROWS && block * ROWS + row < m.rows; row += SPAN)
            for (int64_t t = 0; t < tokens; t += TILE) switch (std::min<int64_t>(TILE, tokens - t)) {
                    case 1: rows_of<BITS, PASSES, 1>(m, in, y, t, block, row); break;
                    case 2: rows_of<BITS, PASSES, 2>(m, in, y, t, block, row); break;
                    case 3: rows_of<BITS, PASSES, 3>(m, in, y, t, block, row); break;
                    case 4: rows_of<BITS, PASSES, std::min(4, TILE)>(m, in, y, t, block, row); break;
                    case 5: rows_of<BITS, PASSES, std::min(5, TILE)>(m, in, y, t, block, row); break;
                    default: rows_of<BITS, PASSES, TILE>(m, in, y, t, block, row);
                }
}

}  // namespace

void product_integers(const Matrix& m, const float* x, float* y, int64_t tokens, int threads) {
    const FixedPoint in(m, x, tokens);
    const bool wide = m.activation_bits != 8;
    if (m.kind == INTEGER4)
        wide ? product<4, 2>(m, in, y, tokens, threads) : product<4, 1>(m, in, y, tokens, threads);
    else
        wide ? product<8, 2>(m, in, y, tokens, threads) : product<8, 1>(m, in, y, tokens, threads);
}
