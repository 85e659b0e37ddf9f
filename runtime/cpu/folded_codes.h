// Folded latent attention over a quantised cache: codes of rows, and two scales per token, the latent's and the rope
// keys', with those of norms behind them (mla_compile/runtime/onnx_quantised.py). Latents are 7-bit codes about 64, rope
// keys 8-bit codes about 128.
//
// With dot products of bytes (AVX-512 VNNI) rows are never decoded: what they are multiplied with becomes bytes too, one
// digit of eight bits for queries of latents and for weights, two for queries of rope keys, which are few and have finer
// codes. Latents' codes have seven bits: what the rounding of a query adds to a score's error is half of what theirs does.
// Other processors decode a block at a time.
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

inline long attend_codes_scratch(const Sizes& s) { return attend_copies_scratch(s); }

// Codes become numbers, a block at a time.
struct Decoded {
    const Sizes& s;
    const uint8_t* codes;
    const float* scales;
    float* to;

    Rows rows(long first, long tokens) const {
        for (long t = 0; t < tokens; t++) {
            const uint8_t* code = codes + (first + t) * s.codes();
            const float* scale = scales + (first + t) * s.scales();
            const float latent = scale[0], rope = scale[1];
            float* row = to + t * s.row;
            for (long k = 0; k < s.rank; k++) row[k] = (code[k] - kLatentMiddle) * latent;
            for (long k = s.rank; k < s.codes(); k++) row[k] = (code[k] - kRopeMiddle) * rope;
            std::memcpy(row + s.codes(), scale + 2, (s.scales() - 2) * sizeof(float));
        }
        return {to, nullptr, s.row, s.row};
    }
    const uint8_t* ahead(long t, long k) const { return codes + (t + kBlock) * s.codes() + k; }
};

inline void attend_codes(const Sizes& s, long split, const uint8_t* codes, const float* scales, const Logits& logits,
                         const float* query_RM, float* partial, float* scratch) {
    const Decoded source{s, codes, scales, scratch + attend_scratch(s)};
    attend_scaled(s, split, logits, query_RM, partial, scratch, source);
}

#else

constexpr long kCodeBlock = 192;   // tokens of a block, at most
constexpr int kCodeTokens = 12;    // of a tile of scores; blocks are filled up to as many
constexpr int kCodeHeads = 4;      // of a tile of sums
constexpr long kChannels = 64;     // that are interleaved at a time
constexpr int kLatentDigits = 1, kRopeDigits = 2;

inline __m512i nearest(Vector value) { return _mm512_cvtps_epi32(reinterpret_cast<__m512>(value)); }

inline Vector number(__m512i value) { return reinterpret_cast<Vector>(_mm512_cvtepi32_ps(value)); }

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

// Memory that is read next.
struct Ahead {
    const uint8_t* from = nullptr;
    long bytes = 0;
};

// A query's part, the latent's or the rope keys', for `lanes` queries side by side: four channels' high bytes, as many
// low ones where there are two digits, and so on; then every query's scale, and what its products are too large by for
// the codes' middle.
template <int Digits>
struct CodeQuery {
    static constexpr long levels = 127, finer = Digits == 1 ? 1 : 2 * levels;
    long groups, lanes;
    const float* scale;
    const float* excess;
    const int8_t* digits;  // [groups, Digits, lanes, 4]

    CodeQuery(const float* from, long channels, long lanes)
        : groups(fours(channels)), lanes(lanes), scale(from), excess(from + lanes),
          digits(reinterpret_cast<const int8_t*>(from + 2 * lanes)) {}

    static long floats(long channels, long lanes) { return (2 + Digits * fours(channels)) * lanes; }

    static void encode(const float* query_KM, long channels, long lanes, float middle, float* to) {
        auto* digits = reinterpret_cast<int8_t*>(to + 2 * lanes);
        const __m512i byte = _mm512_set1_epi32(255);
        for (long m = 0; m < lanes; m += kLanes) {
            const float* query = query_KM + m;
            Vector largest = all(1e-20f);
            for (long k = 0; k < channels; k++)
                largest = larger(largest, larger(load(query + k * lanes), -load(query + k * lanes)));
            const Vector factor = static_cast<float>(levels) / largest;
            __m512i total = _mm512_setzero_si512();
            for (long g = 0; g < fours(channels); g++) {
                __m512i bytes[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
                for (long i = 0; i < std::min(4L, channels - 4 * g); i++) {
                    const Vector steps = load(query + (4 * g + i) * lanes) * factor;
                    const __m512i high = nearest(steps);
                    __m512i both = high;
                    bytes[0] = _mm512_or_si512(bytes[0], _mm512_slli_epi32(_mm512_and_si512(high, byte), 8 * i));
                    if constexpr (Digits == 2) {
                        const __m512i low = nearest((steps - number(high)) * static_cast<float>(finer));
                        both = _mm512_add_epi32(_mm512_mullo_epi32(high, _mm512_set1_epi32(finer)), low);
                        bytes[1] = _mm512_or_si512(bytes[1], _mm512_slli_epi32(_mm512_and_si512(low, byte), 8 * i));
                    }
                    total = _mm512_add_epi32(total, both);
                }
                for (int d = 0; d < Digits; d++)
                    _mm512_storeu_si512(digits + ((g * Digits + d) * lanes + m) * 4, bytes[d]);
            }
            store(to + m, largest * (1.0f / (levels * finer)));
            store(to + lanes + m, number(total) * middle);
        }
    }

    // Products of Tokens rows' codes with 2 kLanes queries, in units of the queries' scales. Meanwhile `ahead` is brought
    // to the processor's cache: bit by bit, for it can wait for a few lines only.
    template <int Tokens>
    void multiply(const uint8_t* codes, long stride, long lane, Vector (&products)[Tokens][2], Ahead ahead = {}) const {
        __m512i sums[Tokens][2 * Digits] = {};
        const long step = up_to(ahead.bytes / std::max(1L, groups) + 1, 64);
        for (long g = 0; g < groups; g++) {
            for (long i = g * step; i < std::min((g + 1) * step, ahead.bytes); i += 64) __builtin_prefetch(ahead.from + i);
            const int8_t* from = digits + (g * Digits * lanes + lane) * 4;
            __m512i own[2 * Digits];
#pragma GCC unroll 4
            for (int j = 0; j < 2 * Digits; j++) own[j] = _mm512_loadu_si512(from + j / 2 * lanes * 4 + j % 2 * 64);
#pragma GCC unroll 16
            for (int t = 0; t < Tokens; t++) {
                const __m512i bytes = four_bytes(codes + t * stride + 4 * g);
#pragma GCC unroll 4
                for (int j = 0; j < 2 * Digits; j++) sums[t][j] = dot(sums[t][j], bytes, own[j]);
            }
        }
#pragma GCC unroll 16
        for (int t = 0; t < Tokens; t++)
#pragma GCC unroll 4
            for (int j = 0; j < 2; j++) {
                products[t][j] = number(sums[t][j]);
                if constexpr (Digits == 2)
                    products[t][j] = products[t][j] * static_cast<float>(finer) + number(sums[t][2 + j]);
            }
    }

    Vector score(Vector product, long m) const {
        return (product - load(excess + m)) * load(scale + m);
    }
};

using LatentQuery = CodeQuery<kLatentDigits>;
using RopeQuery = CodeQuery<kRopeDigits>;

// Of both parts; they lie behind the queries themselves, which are not needed any more then.
inline long code_query(const Sizes& s) {
    return s.query() + LatentQuery::floats(s.rank, s.lanes()) + RopeQuery::floats(s.codes() - s.rank, s.lanes());
}

inline void encode_queries(const Sizes& s, float* query_RM) {
    float* latent = query_RM + s.query();
    float* rope = latent + LatentQuery::floats(s.rank, s.lanes());
    LatentQuery::encode(query_RM, s.rank, s.lanes(), kLatentMiddle, latent);
    RopeQuery::encode(query_RM + s.rank * s.lanes(), s.codes() - s.rank, s.lanes(), kRopeMiddle, rope);
}

// Multiply what every query makes of Tokens tokens with its own of `count` scales per token, which begin at `first` among
// all that a token has.
template <int Tokens>
inline void scale_codes(const Sizes& s, const float* scales, long first, long count, const float* query, float* numbers) {
    query += (s.codes() + first - 2) * s.lanes();
    for (int t = 0; t < Tokens; t++) {
        const float* own = scales + t * s.scales() + first;
        Vector left{}, right{};
        for (long k = 0; k < count; k++) {
            left += load(query + k * s.lanes()) * own[k];
            right += load(query + k * s.lanes() + kLanes) * own[k];
        }
        float* to = numbers + t * s.lanes();
        store(to, load(to) * left);
        store(to + kLanes, load(to + kLanes) * right);
    }
}

inline void code_scores(const Sizes& s, const uint8_t* codes, const float* scales, long tokens, const float* query_RM,
                        float* scores) {
    const long width = s.codes(), beside = s.scales();
    constexpr int half = kCodeTokens / kRopeDigits;  // as many sums fit into the registers
    const float* encoded = query_RM + s.query();
    const LatentQuery latent(encoded, s.rank, s.lanes());
    const RopeQuery rope(encoded + LatentQuery::floats(s.rank, s.lanes()), width - s.rank, s.lanes());
    for (long lane = 0; lane < s.lanes(); lane += 2 * kLanes) {
        for (long t = 0; t < tokens; t += kCodeTokens) {
            const uint8_t* row = codes + t * width;
            const float* scale = scales + t * beside;
            float* to = scores + t * s.lanes() + lane;
            Vector of_latent[kCodeTokens][2];
            latent.multiply(row, width, lane, of_latent, Ahead{row + kCodeTokens * width, kCodeTokens * width});
#pragma GCC unroll 16
            for (int i = 0; i < kCodeTokens; i++)
#pragma GCC unroll 4
                for (int j = 0; j < 2; j++)
                    store(to + i * s.lanes() + j * kLanes,
                          latent.score(of_latent[i][j], lane + j * kLanes) * scale[i * beside]);
            if (s.key_scales && !s.scaled_rope) scale_codes<kCodeTokens>(s, scale, 2, s.key_scales, query_RM + lane, to);
            for (int first = 0; first < kCodeTokens; first += half) {
                Vector of_rope[half][2];
                rope.multiply(row + first * width + s.rank, width, lane, of_rope);
#pragma GCC unroll 16
                for (int i = 0; i < half; i++)
#pragma GCC unroll 4
                    for (int j = 0; j < 2; j++) {
                        float* score = to + (first + i) * s.lanes() + j * kLanes;
                        const float unit = scale[(first + i) * beside + 1];
                        store(score, load(score) + rope.score(of_rope[i][j], lane + j * kLanes) * unit);
                    }
            }
            if (s.key_scales && s.scaled_rope) scale_codes<kCodeTokens>(s, scale, 2, s.key_scales, query_RM + lane, to);
        }
    }
}

// A block's latents, four tokens' codes of a channel side by side: [tokens / 4, channels / 64, 256]. Among 64 channels,
// channel 16 i + 4 j + k comes to place 16 j + 4 i + k.
inline void interleave(const Sizes& s, const uint8_t* codes, long tokens, uint8_t* to) {
    const long width = s.codes();
    for (long t = 0; t < tokens; t += 4)
        for (long k = 0; k < s.sum(); k += kChannels) {
            const uint8_t* from = codes + t * width + k;
            const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + width),
                          c = _mm512_loadu_si512(from + 2 * width), d = _mm512_loadu_si512(from + 3 * width);
            const __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b),
                          cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
            _mm512_storeu_si512(to, _mm512_unpacklo_epi16(ab, cd));
            _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi16(ab, cd));
            _mm512_storeu_si512(to + 128, _mm512_unpacklo_epi16(AB, CD));
            _mm512_storeu_si512(to + 192, _mm512_unpackhi_epi16(AB, CD));
            to += 256;
        }
}

// Weights times the scales of their tokens' latents as bytes, those of four tokens side by side, [tokens / 4, lanes, 4],
// and every query's unit and sum. What rounding takes from a token the next one gets: beside one that has half of the
// attention, the many that share the rest would all be rounded to nothing else. So a block's sum is right to half a unit.
struct CodeWeights {
    uint8_t* digits;
    float* unit;
    int32_t* excess;
};

inline void encode_weights(const Sizes& s, const float* weights, const float* scales, long tokens,
                           const CodeWeights& to) {
    constexpr float levels = 254;  // and half a unit from the token before: 255 at most
    const long beside = s.scales();
    for (long m = 0; m < s.lanes(); m += kLanes) {
        Vector largest = all(1e-30f);
        for (long t = 0; t < tokens; t++)
            largest = larger(largest, load(weights + t * s.lanes() + m) * scales[t * beside]);
        const Vector factor = levels / largest;
        Vector rest{};
        __m512i total = _mm512_setzero_si512();
        for (long t = 0; t < tokens; t += 4) {
            __m512i digits = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const Vector steps = load(weights + (t + i) * s.lanes() + m) * scales[(t + i) * beside] * factor + rest;
                const __m512i code = nearest(steps);
                rest = steps - number(code);
                total = _mm512_add_epi32(total, code);
                digits = _mm512_or_si512(digits, _mm512_slli_epi32(code, 8 * i));
            }
            _mm512_storeu_si512(to.digits + (t / 4 * s.lanes() + m) * 4, digits);
        }
        store(to.unit + m, largest * (1 / levels));
        _mm512_storeu_si512(to.excess + m, _mm512_mullo_epi32(total, _mm512_set1_epi32(static_cast<int>(kLatentMiddle))));
    }
}

inline void add_codes(const Sizes& s, const uint8_t* interleaved, const CodeWeights& weights, long tokens,
                      const float* shrink, float* sums) {
    const long step = s.sum() * 4;  // bytes of four tokens
    for (long k = 0; k < s.sum(); k += kChannels)
        for (long m = 0; m < s.columns(); m += kCodeHeads) {
            __m512i tile[kCodeHeads][4] = {};
            for (long g = 0; g < tokens / 4; g++) {
                const uint8_t* from = interleaved + g * step + k * 4;
                __m512i codes[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) codes[j] = _mm512_loadu_si512(from + 64 * j);
#pragma GCC unroll 4
                for (int h = 0; h < kCodeHeads; h++) {
                    const __m512i own = four_bytes(weights.digits + (g * s.lanes() + m + h) * 4);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) tile[h][j] = dot(tile[h][j], own, codes[j]);
                }
            }
#pragma GCC unroll 4
            for (int h = 0; h < kCodeHeads; h++)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const __m512i centred = _mm512_sub_epi32(tile[h][j], _mm512_set1_epi32(weights.excess[m + h]));
                    const Vector sum = number(centred);
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
    const long bytes = kCodeBlock * (s.codes() + s.sum() + s.lanes()) + kSpare;
    return kCodeBlock * s.lanes() + 3 * s.lanes() + s.scales() * kCodeBlock + (bytes + 3) / 4 + 16;
}

inline void attend_codes(const Sizes& s, long split, const uint8_t* codes, const float* scales, const Logits& logits,
                         const float* query_RM, float* partial, float* scratch) {
    float *maxima = partial, *totals = partial + s.lanes(), *sums = partial + 2 * s.lanes();
    float *scores = scratch, *shrink = scores + kCodeBlock * s.lanes(), *own_scales = shrink + 3 * s.lanes();
    auto* own_codes = reinterpret_cast<uint8_t*>(own_scales + s.scales() * kCodeBlock);
    uint8_t* interleaved = own_codes + kCodeBlock * s.codes() + kSpare;
    const CodeWeights weights{interleaved + kCodeBlock * s.sum(), shrink + s.lanes(),
                              reinterpret_cast<int32_t*>(shrink + 2 * s.lanes())};
    begin_partial(s, partial);
    const long end = std::min((split + 1) * s.split(), s.tokens);
    for (long t = split * s.split(); t < end; t += kCodeBlock) {
        const long tokens = std::min(kCodeBlock, end - t), filled = up_to(tokens, kCodeTokens);
        if (!mask_block(s, logits.seen_ST + t, tokens, nullptr)) continue;
        const uint8_t* block = codes + t * s.codes();
        const float* block_scales = scales + t * s.scales();
        const long behind = (s.tokens - t - tokens) * s.codes();
        if (tokens < filled || behind < kSpare) {  // nothing is read behind the cache
            std::memcpy(own_codes, block, tokens * s.codes());
            std::memset(own_codes + tokens * s.codes(), 0, (filled - tokens) * s.codes() + kSpare);
            std::memcpy(own_scales, block_scales, s.scales() * tokens * sizeof(float));
            std::fill_n(own_scales + s.scales() * tokens, s.scales() * (filled - tokens), 0.0f);
            block = own_codes;
            block_scales = own_scales;
        }
        code_scores(s, block, block_scales, filled, query_RM, scores);
        finish_scores(s, logits, t, tokens, scores);
        soften(s, tokens, scores, maxima, totals, shrink);
        std::fill_n(scores + tokens * s.lanes(), (filled - tokens) * s.lanes(), 0.0f);
        for (long lane = 0; s.value_scales && lane < s.lanes(); lane += 2 * kLanes)
            for (long i = 0; i < filled; i += kCodeTokens)
                scale_codes<kCodeTokens>(s, block_scales + i * s.scales(), 2 + s.key_scales, s.value_scales,
                                         query_RM + lane, scores + i * s.lanes() + lane);
        encode_weights(s, scores, block_scales, filled, weights);
        interleave(s, block, filled, interleaved);
        add_codes(s, interleaved, weights, filled, shrink, sums);
    }
    restore_order(s, sums);
}

#endif

}  // namespace mla
