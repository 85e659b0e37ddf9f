// Folded latent attention over a quantised cache: codes of rows, and two scales per token, the latent's and the rope
// keys' (mla_compile/runtime/onnx_quantised.py). Latents are 7-bit codes about 64, rope keys 8-bit codes about 128.
//
// With dot products of bytes (AVX-512 VNNI) rows are never decoded: what they are multiplied with becomes integers too,
// queries of 15 bits and weights of 16, in two bytes each. Other processors decode a block at a time.
#pragma once

#include "folded.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define MLA_BYTES 1
#endif

namespace mla {

constexpr float kLatentMiddle = 64, kRopeMiddle = 128;

#ifndef MLA_BYTES

inline long code_query(const Sizes& s) { return s.query(); }

inline void encode_queries(const Sizes&, float*) {}

inline long attend_codes_scratch(const Sizes& s) { return attend_scratch(s) + kBlock * s.row; }

inline void attend_codes(const Sizes& s, long split, const uint8_t* codes, const float* scales, const bool* seen_ST,
                         const float* query_RM, float* partial, float* scratch) {
    float* rows = scratch + attend_scratch(s);
    attend_blocks(s, split, seen_ST, query_RM, partial, scratch, [&](long first, long tokens) -> const float* {
        for (long t = 0; t < tokens; t++) {
            const uint8_t* code = codes + (first + t) * s.row;
            const float latent = scales[2 * (first + t)], rope = scales[2 * (first + t) + 1];
            float* row = rows + t * s.row;
            for (long k = 0; k < s.rank; k++) row[k] = (code[k] - kLatentMiddle) * latent;
            for (long k = s.rank; k < s.row; k++) row[k] = (code[k] - kRopeMiddle) * rope;
        }
        return rows;
    });
}

#else

constexpr long kCodeBlock = 96;    // tokens of a block; sums of a block's products stay below 2^31
constexpr int kCodeTokens = 6;     // of a tile of scores
constexpr int kCodeHeads = 2;      // of a tile of sums
constexpr long kChannels = 64;     // that are interleaved at a time

inline Vector load_as(__m512 value) { return reinterpret_cast<Vector>(value); }

inline __m512i dot(__m512i sums, __m512i unsigned_bytes, __m512i signed_bytes) {
    // Not the intrinsic: GCC 12 keeps what that adds to in memory.
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
    return sums;
}

inline __m512i four_bytes(const void* from) {
    int32_t bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

inline long fours(long count) { return (count + 3) / 4; }

// A query's part, the latent's or the rope keys', for `lanes` queries side by side: four channels' high bytes, as many
// low ones, and so on; then every query's scale, and what its products are too large by for the codes' middle.
struct CodeQuery {
    long groups, lanes;
    const float* scale;
    const float* excess;
    const int8_t* digits;  // [groups, high and low, lanes, 4]

    CodeQuery(const float* from, long channels, long lanes)
        : groups(fours(channels)), lanes(lanes), scale(from), excess(from + lanes),
          digits(reinterpret_cast<const int8_t*>(from + 2 * lanes)) {}

    static long floats(long channels, long lanes) { return 2 * lanes + 2 * fours(channels) * lanes; }
};

// Of both parts; they lie behind the queries themselves, which are not needed any more then.
inline long code_query(const Sizes& s) {
    return s.query() + CodeQuery::floats(s.rank, s.lanes()) + CodeQuery::floats(s.row - s.rank, s.lanes());
}

inline void encode_part(const float* query_KM, long channels, long lanes, float middle, float* to) {
    constexpr float levels = 127, finer = 254;
    auto* digits = reinterpret_cast<int8_t*>(to + 2 * lanes);
    std::memset(digits, 0, fours(channels) * lanes * 8);
    for (long m = 0; m < lanes; m++) {
        float largest = 1e-20f;
        for (long k = 0; k < channels; k++) largest = std::max(largest, std::fabs(query_KM[k * lanes + m]));
        long total = 0;
        for (long k = 0; k < channels; k++) {
            const float steps = query_KM[k * lanes + m] * (levels / largest);
            const long high = std::lrintf(steps), low = std::lrintf((steps - high) * finer);
            int8_t* group = digits + k / 4 * lanes * 8;
            group[m * 4 + k % 4] = static_cast<int8_t>(high);
            group[(lanes + m) * 4 + k % 4] = static_cast<int8_t>(low);
            total += high * static_cast<long>(finer) + low;
        }
        to[m] = largest / levels / finer;
        to[lanes + m] = static_cast<float>(total) * middle;
    }
}

inline void encode_queries(const Sizes& s, float* query_RM) {
    float* latent = query_RM + s.query();
    float* rope = latent + CodeQuery::floats(s.rank, s.lanes());
    encode_part(query_RM, s.rank, s.lanes(), kLatentMiddle, latent);
    encode_part(query_RM + s.rank * s.lanes(), s.row - s.rank, s.lanes(), kRopeMiddle, rope);
}

// Products of kCodeTokens rows' codes, from their first byte on, with 2 kLanes queries, in units of the queries' scales.
inline void code_products(const uint8_t* codes, long stride, const CodeQuery& query, long lane, long begin, long end,
                          __m512 (&products)[kCodeTokens][2]) {
    __m512i sums[kCodeTokens][4] = {};
    for (long g = begin; g < end; g++) {
        const int8_t* high = query.digits + g * query.lanes * 8 + lane * 4;
        const int8_t* low = high + query.lanes * 4;
        __m512i digits[4] = {_mm512_loadu_si512(high), _mm512_loadu_si512(high + 64), _mm512_loadu_si512(low),
                             _mm512_loadu_si512(low + 64)};
#pragma GCC unroll 8
        for (int t = 0; t < kCodeTokens; t++) {
            const __m512i bytes = four_bytes(codes + t * stride + 4 * g);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sums[t][j] = dot(sums[t][j], bytes, digits[j]);
        }
    }
    const __m512 finer = _mm512_set1_ps(254);
#pragma GCC unroll 8
    for (int t = 0; t < kCodeTokens; t++)
#pragma GCC unroll 4
        for (int j = 0; j < 2; j++)
            products[t][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t][j]), finer, _mm512_cvtepi32_ps(sums[t][2 + j]));
}

inline void code_scores(const Sizes& s, const uint8_t* codes, const float* scales, const float* query_RM,
                        float* scores) {
    const float* encoded = query_RM + s.query();
    const CodeQuery latent(encoded, s.rank, s.lanes());
    const CodeQuery rope(encoded + CodeQuery::floats(s.rank, s.lanes()), s.row - s.rank, s.lanes());
    for (long lane = 0; lane < s.lanes(); lane += 2 * kLanes) {
        for (long t = 0; t < kCodeBlock; t += kCodeTokens) {
            __m512 of_latent[kCodeTokens][2], of_rope[kCodeTokens][2];
            const uint8_t* row = codes + t * s.row;
            for (int i = 0; i < kCodeTokens; i++)
                for (long k = 0; k < s.row; k += 64) __builtin_prefetch(row + (kCodeTokens + i) * s.row + k);
            code_products(row, s.row, latent, lane, 0, latent.groups, of_latent);
            code_products(row + s.rank, s.row, rope, lane, 0, rope.groups, of_rope);
#pragma GCC unroll 8
            for (int i = 0; i < kCodeTokens; i++)
#pragma GCC unroll 4
                for (int j = 0; j < 2; j++) {
                    const long m = lane + j * kLanes;
                    const Vector whole = (load_as(of_latent[i][j]) - load(latent.excess + m)) * load(latent.scale + m),
                                 turned = (load_as(of_rope[i][j]) - load(rope.excess + m)) * load(rope.scale + m);
                    store(scores + (t + i) * s.lanes() + m,
                          whole * scales[2 * (t + i)] + turned * scales[2 * (t + i) + 1]);
                }
        }
    }
}

// A block's latents, four tokens' codes of a channel side by side: [tokens / 4, channels / 64, 256]. Among 64 channels,
// channel 16 i + 4 j + k comes to place 16 j + 4 i + k.
inline void interleave(const Sizes& s, const uint8_t* codes, uint8_t* to) {
    for (long t = 0; t < kCodeBlock; t += 4)
        for (long k = 0; k < s.sum(); k += kChannels) {
            const uint8_t* from = codes + t * s.row + k;
            const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + s.row),
                          c = _mm512_loadu_si512(from + 2 * s.row), d = _mm512_loadu_si512(from + 3 * s.row);
            const __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b),
                          cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
            _mm512_storeu_si512(to, _mm512_unpacklo_epi16(ab, cd));
            _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi16(ab, cd));
            _mm512_storeu_si512(to + 128, _mm512_unpacklo_epi16(AB, CD));
            _mm512_storeu_si512(to + 192, _mm512_unpackhi_epi16(AB, CD));
            to += 256;
        }
}

// Weights times the scales of their tokens' latents as 16-bit integers: high bytes and low bytes of four tokens side by
// side, [tokens / 4, lanes, 4] each, and every query's unit and sum.
struct CodeWeights {
    uint8_t *high, *low;
    float* unit;
    int32_t* excess;
};

inline void encode_weights(const Sizes& s, const float* weights, const float* scales, const CodeWeights& to) {
    constexpr float levels = 65535;
    for (long m = 0; m < s.lanes(); m += kLanes) {
        Vector largest = all(1e-30f);
        for (long t = 0; t < kCodeBlock; t++)
            largest = larger(largest, load(weights + t * s.lanes() + m) * scales[2 * t]);
        const Vector factor = levels / largest;
        __m512i total = _mm512_setzero_si512();
        for (long t = 0; t < kCodeBlock; t += 4) {
            __m512i high = _mm512_setzero_si512(), low = high;
            for (int i = 3; i >= 0; i--) {
                const Vector steps = load(weights + (t + i) * s.lanes() + m) * scales[2 * (t + i)] * factor;
                const __m512i code = _mm512_cvtps_epi32(reinterpret_cast<__m512>(steps));
                total = _mm512_add_epi32(total, code);
                high = _mm512_or_si512(_mm512_slli_epi32(high, 8), _mm512_srli_epi32(code, 8));
                low = _mm512_or_si512(_mm512_slli_epi32(low, 8), _mm512_and_si512(code, _mm512_set1_epi32(255)));
            }
            _mm512_storeu_si512(to.high + (t / 4 * s.lanes() + m) * 4, high);
            _mm512_storeu_si512(to.low + (t / 4 * s.lanes() + m) * 4, low);
        }
        store(to.unit + m, largest * (1 / levels));
        _mm512_storeu_si512(to.excess + m, _mm512_mullo_epi32(total, _mm512_set1_epi32(static_cast<int>(kLatentMiddle))));
    }
}

inline void add_codes(const Sizes& s, const uint8_t* interleaved, const CodeWeights& weights, const float* shrink,
                      float* sums) {
    const long step = s.sum() * 4;  // bytes of four tokens
    for (long k = 0; k < s.sum(); k += kChannels)
        for (long m = 0; m < s.columns(); m += kCodeHeads) {
            __m512i high[kCodeHeads][4] = {}, low[kCodeHeads][4] = {};
            for (long g = 0; g < kCodeBlock / 4; g++) {
                const uint8_t* from = interleaved + g * step + k * 4;
                __m512i codes[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) codes[j] = _mm512_loadu_si512(from + 64 * j);
#pragma GCC unroll 4
                for (int h = 0; h < kCodeHeads; h++) {
                    const __m512i of_high = four_bytes(weights.high + (g * s.lanes() + m + h) * 4);
                    const __m512i of_low = four_bytes(weights.low + (g * s.lanes() + m + h) * 4);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) {
                        high[h][j] = dot(high[h][j], of_high, codes[j]);
                        low[h][j] = dot(low[h][j], of_low, codes[j]);
                    }
                }
            }
#pragma GCC unroll 4
            for (int h = 0; h < kCodeHeads; h++)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(high[h][j], 8), low[h][j]);
                    const Vector sum =
                        load_as(_mm512_cvtepi32_ps(_mm512_sub_epi32(both, _mm512_set1_epi32(weights.excess[m + h]))));
                    float* to = sums + (m + h) * s.sum() + k + j * kLanes;
                    store(to, load(to) * shrink[m + h] + sum * weights.unit[m + h]);
                }
        }
}

inline void restore_order(const Sizes& s, float* sums) {
    float ordered[kChannels];
    for (long m = 0; m < s.columns(); m++)
        for (long k = 0; k < s.sum(); k += kChannels) {
            float* strip = sums + m * s.sum() + k;
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++)
                    std::memcpy(ordered + 16 * i + 4 * j, strip + 16 * j + 4 * i, 4 * sizeof(float));
            std::memcpy(strip, ordered, sizeof ordered);
        }
}

constexpr long kSpare = 64;  // bytes behind a row that may be read

inline long attend_codes_scratch(const Sizes& s) {
    const long bytes = kCodeBlock * s.row + kSpare + kCodeBlock * s.sum() + 2 * kCodeBlock * s.lanes();
    return kCodeBlock * s.lanes() + 3 * s.lanes() + 2 * kCodeBlock + (bytes + 3) / 4 + 16;
}

inline void attend_codes(const Sizes& s, long split, const uint8_t* codes, const float* scales, const bool* seen_ST,
                         const float* query_RM, float* partial, float* scratch) {
    float *maxima = partial, *totals = partial + s.lanes(), *sums = partial + 2 * s.lanes();
    float *scores = scratch, *shrink = scores + kCodeBlock * s.lanes(), *own_scales = shrink + 3 * s.lanes();
    auto* own_codes = reinterpret_cast<uint8_t*>(own_scales + 2 * kCodeBlock);
    uint8_t* interleaved = own_codes + kCodeBlock * s.row + kSpare;
    const CodeWeights weights{interleaved + kCodeBlock * s.sum(),
                              interleaved + kCodeBlock * (s.sum() + s.lanes()), shrink + s.lanes(),
                              reinterpret_cast<int32_t*>(shrink + 2 * s.lanes())};
    begin_partial(s, partial);
    const long end = std::min((split + 1) * s.split(), s.tokens);
    for (long t = split * s.split(); t < end; t += kCodeBlock) {
        const long tokens = std::min(kCodeBlock, end - t);
        if (!mask_block(s, seen_ST + t, tokens, nullptr)) continue;
        const uint8_t* block = codes + t * s.row;
        const float* block_scales = scales + 2 * t;
        const long behind = (s.tokens - t - tokens) * s.row;
        if (tokens < kCodeBlock || behind < kSpare) {  // nothing is read behind the cache
            std::memcpy(own_codes, block, tokens * s.row);
            std::memset(own_codes + tokens * s.row, 0, (kCodeBlock - tokens) * s.row + kSpare);
            std::memcpy(own_scales, block_scales, 2 * tokens * sizeof(float));
            std::fill_n(own_scales + 2 * tokens, 2 * (kCodeBlock - tokens), 0.0f);
            block = own_codes;
            block_scales = own_scales;
        }
        code_scores(s, block, block_scales, query_RM, scores);
        mask_block(s, seen_ST + t, tokens, scores);
        soften(s, tokens, scores, maxima, totals, shrink);
        std::fill_n(scores + tokens * s.lanes(), (kCodeBlock - tokens) * s.lanes(), 0.0f);
        encode_weights(s, scores, block_scales, weights);
        interleave(s, block, interleaved);
        add_codes(s, interleaved, weights, shrink, sums);
    }
    restore_order(s, sums);
}

#endif

}  // namespace mla
