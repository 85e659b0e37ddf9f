// Products with up-projections, which lie in memory as numbers, as halves, or as codes.
#pragma once

#include <algorithm>

#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mla {

// Weights that are read from memory once are what a step waits for: the shorter, the sooner it is done. Rows of several
// sequences are multiplied side by side.
inline Vector numbers(const float* from) { return load(from); }

inline Vector numbers(const Half* from) {
    float found[kLanes];
    widen(from, kLanes, found);
    return load(found);
}

inline Vector numbers(const int8_t* from) {
#if defined(__AVX512F__)
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return reinterpret_cast<Vector>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)));
#elif defined(__AVX2__)
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return reinterpret_cast<Vector>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)));
#else
    Vector found;
    for (int i = 0; i < kLanes; i++) found[i] = from[i];
    return found;
#endif
}

inline float number(float value) { return value; }
inline float number(int8_t value) { return value; }

// Some rows of B, which are read from memory in order: [begin, end) of all.
struct Block {
    long begin, end;
};

// Add a block's part of Rows x Width vectors of C = A B, from column `first` on. The next block is brought meanwhile.
template <int Rows, int Width, typename Weight>
inline void multiply_tile(const float* a, const Weight* b, float* c, long inner, long columns, const Block& block,
                          long first) {
    constexpr int line = std::max<int>(64 / sizeof(Weight) / kLanes, 1);  // in vectors
    const long ahead = (block.end - block.begin) * columns;
    Vector sums[Rows][Width] = {};
    if (block.begin)
        for (int i = 0; i < Rows; i++)
            for (int j = 0; j < Width; j++) sums[i][j] = load(c + i * columns + first + j * kLanes);
    for (long k = block.begin; k < block.end; k++) {
        const Weight* own = b + k * columns + first;
#pragma GCC unroll 16
        for (int j = 0; j < Width; j += line) __builtin_prefetch(own + ahead + j * kLanes);
        Vector weights[Width];
#pragma GCC unroll 16
        for (int j = 0; j < Width; j++) {
            weights[j] = numbers(own + j * kLanes);
            if constexpr (Rows > 1) keep(weights[j]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < Rows; i++) {
            Vector number = all(a[i * inner + k]);
            keep(number);
#pragma GCC unroll 16
            for (int j = 0; j < Width; j++) sums[i][j] += number * weights[j];
        }
    }
    for (int i = 0; i < Rows; i++)
        for (int j = 0; j < Width; j++) store(c + i * columns + first + j * kLanes, sums[i][j]);
}

// A block's part of some rows of C, from column `first` on, of which there may be too few for a vector.
template <int Rows, int Width, typename Weight>
inline void multiply_rows(const float* a, const Weight* b, float* c, long inner, long columns, const Block& block,
                          long first) {
    for (; first + Width * kLanes <= columns; first += Width * kLanes)
        multiply_tile<Rows, Width>(a, b, c, inner, columns, block, first);
    if constexpr (Width > 1) {
        multiply_rows<Rows, Width / 2>(a, b, c, inner, columns, block, first);
    } else {
        for (int i = 0; i < Rows; i++)
            for (long j = first; j < columns; j++) {
                float sum = block.begin ? c[i * columns + j] : 0;
                for (long k = block.begin; k < block.end; k++) sum += a[i * inner + k] * number(b[k * columns + j]);
                c[i * columns + j] = sum;
            }
    }
}

template <int Rows, typename Weight>
inline void multiply_block(const float* a, const Weight* b, float* c, long rows, long inner, long columns,
                           const Block& block) {
    constexpr int sums = 2 * kTokens;  // that registers hold
    long i = 0;
    for (; i + Rows <= rows; i += Rows)
        multiply_rows<Rows, sums / Rows>(a + i * inner, b, c + i * columns, inner, columns, block, 0);
    if constexpr (Rows > 1)
        multiply_block<Rows / 2>(a + i * inner, b, c + i * columns, rows - i, inner, columns, block);
}

// C [rows, columns] = A [rows, inner] B [inner, columns].
template <typename Weight>
inline void multiply(const float* a, const Weight* b, float* c, long rows, long inner, long columns) {
    constexpr long bytes = 16384;  // of a block: it and the next stay in the processor's nearest caches
    const long step = std::max<long>(bytes / (columns * sizeof(Weight)), 4);
    long k = 0;
    do {  // once at least: of no channels the sum is zero
        multiply_block<kTokens>(a, b, c, rows, inner, columns, Block{k, std::min(k + step, inner)});
        k += step;
    } while (k < inner);
}

}  // namespace mla
