// Vectors of float32 as wide as the processor's, in the terms of GCC and Clang.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace mla {

// Accumulators of a tile are kept in registers: 32 of them with AVX-512 and on ARM, 16 with AVX2.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTokens = 8, kHeads = 4, kColumns = 4;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kLanes = 8, kTokens = 4, kHeads = 4, kColumns = 2;
#else
constexpr int kLanes = 4, kTokens = 8, kHeads = 4, kColumns = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

inline Vector load(const float* from) {
    Vector found;
    std::memcpy(&found, from, sizeof found);
    return found;
}

inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

// Fewer numbers than a vector has, and zeros.
inline Vector load(const float* from, long count) {
    if (count >= kLanes) return load(from);
    Vector found{};
    std::memcpy(&found, from, count * sizeof(float));
    return found;
}

// The bits of a float16.
struct Half {
    uint16_t bits;
};

// Its number: 112 is what the middles of exponents are apart. Numbers below 2^-14 have no exponent in either form.
inline float number(Half half) {
    uint32_t bits = static_cast<uint32_t>(half.bits & 0x7fff) << 13;
    float size;
    std::memcpy(&size, &bits, sizeof size);
    size *= 0x1p112f;
    std::memcpy(&bits, &size, sizeof bits);
    if ((half.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;  // infinite, or no number
    bits |= static_cast<uint32_t>(half.bits & 0x8000) << 16;
    std::memcpy(&size, &bits, sizeof size);
    return size;
}

inline void widen(const Half* from, long count, float* to) {
    long i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
    for (; i < count; i++) to[i] = number(from[i]);
}

// The nearest float16 of a number, of two as near the one that is even. What is too large is infinite.
inline Half nearest_half(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) {
        bits = 0x7e00 | (bits >> 13 & 0x3ff);  // no number
    } else if (bits >= 0x47800000) {
        bits = 0x7c00;
    } else if (bits < 0x38800000) {  // there float16 has one unit, which is the last place of 0.5
        float size;
        std::memcpy(&size, &bits, sizeof size);
        size += 0.5f;
        std::memcpy(&bits, &size, sizeof bits);
        bits -= 0x3f000000;
    } else {
        bits = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    return {static_cast<uint16_t>(sign | bits)};
}

inline void narrow(const float* from, long count, Half* to) {
    long i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
    for (; i < count; i++) to[i] = nearest_half(from[i]);
}

// Keep a value in a register: compilers else read it from memory anew for each of its products, and loads are what there
// are too few of. (A vector, or a number.)
template <typename Value>
inline void keep(Value& value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#elif defined(__AVX__)
    asm("" : "+x"(value));
#elif defined(__aarch64__)
    asm("" : "+w"(value));
#else
    (void)value;
#endif
}

inline Vector all(float value) { return value - Vector{}; }

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

constexpr float kLowest = -87.0f;  // e^x is hardly a normal number below

// e^x = power * (1 + f * slope) for x <= 0, or for kLowest where x is below it.
//
// x = n ln 2 + f with |f| <= ln(2) / 2, of which ln 2 is taken off in two parts, the first of few digits; e^f is its
// Taylor series up to f^7, the rest of which is below 2e-8.
struct Exponential {
    Vector power, f, slope;
};

inline Exponential exponential_parts(Vector x) {
    const Vector lowest = all(kLowest);
    const Vector bounded = x < lowest ? lowest : x;
    const Vector magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vector shifted = bounded * 1.44269504f + magic;
    const Vector n = shifted - magic;
    Vector f = bounded - n * 0.693359375f;
    f = f + n * 2.12194440e-4f;
    Vector sum = all(1.0f / 5040);
    sum = sum * f + 1.0f / 720;
    sum = sum * f + 1.0f / 120;
    sum = sum * f + 1.0f / 24;
    sum = sum * f + 1.0f / 6;
    sum = sum * f + 0.5f;
    sum = sum * f + 1.0f;
    Integers bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + (127 << 23);  // the integer is in the lowest bits; those of the magic number are shifted out
    Vector power;
    std::memcpy(&power, &bits, sizeof power);
    return {power, f, sum};
}

// e^x for x <= 0, to two units in the last place; 0 where it is below what a normal number can be.
inline Vector exponential(Vector x) {
    const auto [power, f, slope] = exponential_parts(x);
    return x < all(kLowest) ? Vector{} : (slope * f + 1.0f) * power;
}

// tanh x, to four units in the last place, as -e / (2 + e) with e = e^(-2 |x|) - 1: for small x the two ones of that are
// left out, which would leave few digits.
inline Vector hyperbolic_tangent(Vector x) {
    const Vector size = larger(x, -x);
    const auto [power, f, slope] = exponential_parts(-2.0f * size);
    const Vector less = power * (slope * f) + (power - 1.0f);
    const Vector found = -less / (less + 2.0f);
    return x < Vector{} ? -found : found;
}

}  // namespace mla
