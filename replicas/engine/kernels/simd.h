// Vectors of the processor at hand through the compiler's own vector types: 16 lanes with AVX-512, else 8.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define WIDE 1
constexpr int LANES = 16;
#else
#define WIDE 0
constexpr int LANES = 8;
#endif

typedef float vf __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int8_t vb __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t vub __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t vh __attribute__((vector_size(LANES * 2), aligned(1), may_alias));

// Weights are read once a step, in a line from beginning to end; the processor alone looks no further than a page, and
// took half as long again. Beyond the last weight nothing happens.
constexpr int AHEAD_BYTES = 8192;
static inline void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + AHEAD_BYTES); }

static inline vf splat(float x) { return vf{} + x; }
static inline vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
static inline void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }

// IEEE half precision, exactly.
static inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
    float x;
    std::memcpy(&x, &magnitude, 4);
    x *= 5.192296858534828e33f;  // 2^112 moves the exponent's bias from 15 to 127, subnormals included
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;  // infinity, or no number
    bits |= sign;
    std::memcpy(&x, &bits, 4);
    return x;
}

// The nearest half, ties to even; infinity for what is too large. Not every compiler has a type for halves in C++.
static inline uint16_t float_to_half(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;  // no number
    if (bits < 0x38800000) {  // below 2^-14 halves lie 2^-24 apart, as floats do from 0.5 on
        float sum;
        std::memcpy(&sum, &bits, 4);
        sum += 0.5f;
        std::memcpy(&bits, &sum, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000));
    }
    const uint32_t rounded = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;  // the exponents' biases: 127, 15
    return static_cast<uint16_t>(sign | std::min<uint32_t>(rounded, 0x7c00));
#endif
}

static inline vf from_half(vh h) {
#if WIDE
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)h);
#else
    vf out;
    for (int i = 0; i < LANES; i++) out[i] = half_to_float(h[i]);
    return out;
#endif
}

static inline vf load_half(const uint16_t* p) { return from_half(*reinterpret_cast<const vh*>(p)); }

// table[code & 15] in every lane; table has 16 entries.
static inline vf look_up(const float* table, vu codes) {
#if WIDE
    return (vf)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(table));
#else
    vf out;
    for (int i = 0; i < LANES; i++) out[i] = table[codes[i] & 15];
    return out;
#endif
}

static inline vf from_int8(const int8_t* p) {
#if WIDE
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    return __builtin_convertvector(*reinterpret_cast<const vb*>(p), vf);
#endif
}

// 8-bit floats by way of half precision. e4m3's exponent has bias 7 where a half's has 15: the result is 2^8 too small,
// which the caller's scale makes good. e5m2 is the upper byte of a half.
static inline vf from_e4m3(const uint8_t* p) {
    const vh b = __builtin_convertvector(*reinterpret_cast<const vub*>(p), vh);
    return from_half(((b & 0x80) << 8) | ((b & 0x7f) << 7));
}

static inline vf from_e5m2(const uint8_t* p) {
    return from_half(__builtin_convertvector(*reinterpret_cast<const vub*>(p), vh) << 8);
}

static inline float sum(vf x) {
#if WIDE
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0.0f;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
#endif
}

static inline vf vmax(vf a, vf b) { return a > b ? a : b; }

static inline float largest_lane(vf x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, x[i]);
    return most;
}

// e^x for x <= 88, by 2^n times a polynomial (Cephes' coefficients); 0 below -87.
static inline vf vexp(vf x) {
    const vf bounded = vmax(x, splat(-87.0f));
    const vf shifted = bounded * 1.44269504088896341f + 12582912.0f;  // the nearest integer in the lowest bits
    const vf n = shifted - 12582912.0f;
    vf r = bounded - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const vi power = ((vi)shifted - 0x4b400000 + 127) << 23;
    const vf found = p * (vf)power;
    return x < -87.0f ? vf{} : found;
}
