// Attention of single tokens over a paged KV cache, read where it lies (layout: ../attention.py), and its int8 rows.

#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

enum Stored { FLOAT32 = 0, SIGNED8 = 1, FLOAT8_E4M3 = 2, FLOAT8_E5M2 = 3 };

extern "C" struct Cache {
    void* values;     // rows of head_dim
    uint16_t* scale;  // SIGNED8: a half a row
    int32_t stored;
};

extern "C" struct Decode {
    const int64_t* blocks;  // [num_seqs, num_blocks]
    const float* bias;      // [num_seqs, num_blocks * block_size]: 0 where a key is seen, -inf where not
    int64_t num_seqs, num_blocks, block_size, num_heads, num_kv_heads, head_dim;
    int64_t query_stride;  // floats from one token's queries to the next's
    float scale;
    int32_t threads;
};

namespace {

constexpr float NOT_SEEN = -std::numeric_limits<float>::infinity();

template <int STORED>
inline vf load_row(const void* values, int64_t at) {
    switch (STORED) {
        case SIGNED8: return from_int8(static_cast<const int8_t*>(values) + at);
        case FLOAT8_E4M3: return from_e4m3(static_cast<const uint8_t*>(values) + at);
        case FLOAT8_E5M2: return from_e5m2(static_cast<const uint8_t*>(values) + at);
        default: return load(static_cast<const float*>(values) + at);
    }
}

template <int STORED>
inline float row_scale(const Cache& cache, int64_t row) {
    if (STORED == SIGNED8) return half_to_float(cache.scale[row]);
    return STORED == FLOAT8_E4M3 ? 256.0f : 1.0f;  // from_e4m3 is 2^8 too small
}

// Scores to weights that sum to one: [num_keys], num_keys a multiple of the lanes or followed by room for them.
void softmax(float* scores, int64_t num_keys) {
    float most = NOT_SEEN;
    for (int64_t j = 0; j < num_keys; j++) most = std::max(most, scores[j]);
    for (int64_t j = num_keys; j % LANES; j++) scores[j] = NOT_SEEN;
    vf total = {};
    for (int64_t j = 0; j < num_keys; j += LANES) {
        const vf e = vexp(load(scores + j) - most);
        store(scores + j, e);
        total += e;
    }
    const float inverse = 1.0f / sum(total);
    for (int64_t j = 0; j < num_keys; j++) scores[j] *= inverse;
}

// G query heads of one KV head of one sequence. N: vectors a row.
template <int STORED, int N, int G>
void attend(const Cache& cache, const Decode& d, int64_t seq, int64_t kv_head, const float* q, float* out) {
    const int64_t num_keys = d.num_blocks * d.block_size, padded = (num_keys + LANES - 1) / LANES * LANES;
    thread_local std::vector<float> buffer;
    buffer.resize(G * padded);
    const int64_t* blocks = d.blocks + seq * d.num_blocks;
    const float* bias = d.bias + seq * num_keys;
    vf query[G][N];
    for (int g = 0; g < G; g++)
        for (int v = 0; v < N; v++) query[g][v] = load(q + g * d.head_dim + v * LANES) * d.scale;
    for (int64_t b = 0; b < d.num_blocks; b++) {
        const int64_t first = (blocks[b] * 2 * d.num_kv_heads + kv_head) * d.block_size;
        for (int64_t o = 0; o < d.block_size; o++) {
            const int64_t j = b * d.block_size + o, row = first + o;
            if (bias[j] != 0.0f) {
                for (int g = 0; g < G; g++) buffer[g * padded + j] = NOT_SEEN;
                continue;
            }
            vf dot[G] = {};
            for (int v = 0; v < N; v++) {
                const vf key = load_row<STORED>(cache.values, row * d.head_dim + v * LANES);
                for (int g = 0; g < G; g++) dot[g] += key * query[g][v];
            }
            const float scale = row_scale<STORED>(cache, row);
            for (int g = 0; g < G; g++) buffer[g * padded + j] = sum(dot[g]) * scale;
        }
    }
    for (int g = 0; g < G; g++) softmax(buffer.data() + g * padded, num_keys);
    vf total[G][N] = {};
    for (int64_t b = 0; b < d.num_blocks; b++) {
        const int64_t first = (blocks[b] * 2 * d.num_kv_heads + d.num_kv_heads + kv_head) * d.block_size;
        for (int64_t o = 0; o < d.block_size; o++) {
            const int64_t j = b * d.block_size + o, row = first + o;
            if (bias[j] != 0.0f) continue;
            const float scale = row_scale<STORED>(cache, row);
            vf weight[G];
            for (int g = 0; g < G; g++) weight[g] = splat(buffer[g * padded + j] * scale);
            for (int v = 0; v < N; v++) {
                const vf value = load_row<STORED>(cache.values, row * d.head_dim + v * LANES);
                for (int g = 0; g < G; g++) total[g][v] += weight[g] * value;
            }
        }
    }
    for (int g = 0; g < G; g++)
        for (int v = 0; v < N; v++) store(out + g * d.head_dim + v * LANES, total[g][v]);
}

template <int STORED, int N>
void decode(const Cache& cache, const Decode& d, const float* q, float* out) {
    constexpr int TILE = N <= 4 ? 4 : N <= 8 ? 2 : 1;  // query heads whose sums stay in registers
    const int64_t group = d.num_heads / d.num_kv_heads, work = d.num_seqs * d.num_kv_heads;
#pragma omp parallel for num_threads(d.threads) if (d.threads > 1)
    for (int64_t i = 0; i < work; i++) {
        const int64_t seq = i / d.num_kv_heads, kv_head = i % d.num_kv_heads;
        for (int64_t g = 0; g < group; g += TILE) {
            const int64_t head = kv_head * group + g;
            const float* from = q + seq * d.query_stride + head * d.head_dim;
            float* to = out + (seq * d.num_heads + head) * d.head_dim;
            switch (std::min<int64_t>(TILE, group - g)) {
                case 1: attend<STORED, N, 1>(cache, d, seq, kv_head, from, to); break;
                case 2: attend<STORED, N, std::min(2, TILE)>(cache, d, seq, kv_head, from, to); break;
                case 3: attend<STORED, N, std::min(3, TILE)>(cache, d, seq, kv_head, from, to); break;
                default: attend<STORED, N, TILE>(cache, d, seq, kv_head, from, to);
            }
        }
    }
}

template <int STORED>
int decode_any(const Cache& cache, const Decode& d, const float* q, float* out) {
    switch (d.head_dim / LANES) {
        case 1: decode<STORED, 1>(cache, d, q, out); return 0;
        case 2: decode<STORED, 2>(cache, d, q, out); return 0;
        case 4: decode<STORED, 4>(cache, d, q, out); return 0;
        case 5: decode<STORED, 5>(cache, d, q, out); return 0;
        case 6: decode<STORED, 6>(cache, d, q, out); return 0;
        case 8: decode<STORED, 8>(cache, d, q, out); return 0;
        case 10: decode<STORED, 10>(cache, d, q, out); return 0;
        case 12: decode<STORED, 12>(cache, d, q, out); return 0;
        case 16: decode<STORED, 16>(cache, d, q, out); return 0;
        default: return 1;
    }
}

}  // namespace

// q: tokens `query_stride` apart, out: [num_seqs, num_heads, head_dim]. 1 for a head_dim that is not compiled in.
extern "C" int warmgate_decode(const Cache* cache, const Decode* d, const float* q, float* out) {
    switch (cache->stored) {
        case SIGNED8: return decode_any<SIGNED8>(*cache, *d, q, out);
        case FLOAT8_E4M3: return decode_any<FLOAT8_E4M3>(*cache, *d, q, out);
        case FLOAT8_E5M2: return decode_any<FLOAT8_E5M2>(*cache, *d, q, out);
        default: return decode_any<FLOAT32>(*cache, *d, q, out);
    }
}

// Rounds rows to int8 with a scale each. values: [num_rows, head_dim]
extern "C" void warmgate_store_int8(const Cache* cache, const int64_t* rows, const float* values, int64_t num_rows,
                                    int64_t head_dim) {
    for (int64_t i = 0; i < num_rows; i++) {
        const float* x = values + i * head_dim;
        float largest = 0.0f;
        for (int64_t c = 0; c < head_dim; c++) largest = std::max(largest, std::fabs(x[c]));
        const uint16_t half = float_to_half(largest / 127.0f);
        const float scale = half_to_float(half), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        int8_t* codes = static_cast<int8_t*>(cache->values) + rows[i] * head_dim;
        for (int64_t c = 0; c < head_dim; c++) {
            const float bounded = std::min(127.0f, std::max(-127.0f, x[c] * inverse));
            codes[c] = static_cast<int8_t>((bounded + 12582912.0f) - 12582912.0f);
        }
        cache->scale[rows[i]] = half;
    }
}
