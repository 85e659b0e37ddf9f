// What comes before attention in a step: queries scaled and rotated, new rows rotated and written to the cache, and
// which of its rows each query sees. It is what the standard operators of mla_compile/runtime/onnx_queries.py,
// onnx_rows.py and onnx_quantised.py compute, number for number.
#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace mla {

// How the rows of a cache lie, and which are kept.
enum class Keeps {
    All,   // the new rows behind the earlier ones
    Room,  // the same, in memory that has rows to spare behind them
    Last,  // those that a window shows to later queries
    Ring,  // those too: of P slots, a token is in the one of its number modulo P
};

struct Step {
    long batch, queries, heads, plain, rope, rope_groups;  // there are as many new rows as queries
    long rank, scales;                                     // of a row: before its rope keys and behind them
    long past, total;                                      // rows that the cache holds; tokens, the new ones among them
    long window;                                           // of 32 bits; 0: none
    bool chunked;
    Keeps keeps;

    long channels() const { return plain + rope; }  // of a head
    long half() const { return rope / 2; }
    long codes() const { return rank + rope_groups * rope; }  // of a row that is quantised
    long row() const { return codes() + scales; }
    bool apart() const { return keeps == Keeps::Last || keeps == Keeps::Ring; }  // what is attended to is not the cache
    long earlier() const { return total - queries; }                            // tokens
    long rows() const { return keeps == Keeps::Room ? past : past + queries; }   // attended to
    long first_new() const { return keeps == Keeps::Room ? earlier() : past; }   // of them
    long kept() const {
        if (keeps == Keeps::Last) return std::min(rows(), window - 1);
        return keeps == Keeps::Ring ? past : rows();
    }
};

// Cosines and sines [B, S, n, d / 2], and how far apart those of two sequences, tokens and groups are.
struct Rotation {
    const float *cos, *sin;
    long sequence, token, group;

    Rotation at(long b, long q, long g) const {
        const long skipped = b * sequence + q * token + g * group;
        return {cos + skipped, sin + skipped, sequence, token, group};
    }
};

// Rotate pairs of channels. Products are rounded before they are added, as those of standard operators are: compilers do
// both at once where processors can.
template <typename Value>
inline void turn_pairs(Value cos, Value sin, Value& real, Value& imaginary) {
    keep(real);
    keep(imaginary);
    Value rc = real * cos, is = imaginary * sin, ic = imaginary * cos, rs = real * sin;
    keep(rc);
    keep(is);
    keep(ic);
    keep(rs);
    real = rc - is;
    imaginary = ic + rs;
}

// Scale and rotate channels, of which those of a pair lie `half` apart.
inline void turn(const float* from, float factor, const Rotation& by, long half, float* to) {
    long i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        Vector real = load(from + i) * factor, imaginary = load(from + half + i) * factor;
        turn_pairs(load(by.cos + i), load(by.sin + i), real, imaginary);
        store(to + i, real);
        store(to + half + i, imaginary);
    }
    for (; i < half; i++) {
        float real = from[i] * factor, imaginary = from[half + i] * factor;
        turn_pairs(by.cos[i], by.sin[i], real, imaginary);
        to[i] = real;
        to[half + i] = imaginary;
    }
}

// All heads of one query: `plain_HD` and `turned_nhd`, which are groups of heads and so heads in order.
inline void prepare_query(const Step& s, const float* query_HD, float factor, const Rotation& by, float* plain_HD,
                          float* turned_nhd) {
    const long per_group = s.heads / s.rope_groups;
    for (long h = 0; h < s.heads; h++) {
        const float* head = query_HD + h * s.channels();
        for (long k = 0; k < s.plain; k++) plain_HD[h * s.plain + k] = head[k] * factor;
        turn(head + s.plain, factor, by.at(0, 0, h / per_group), s.half(), turned_nhd + h * s.rope);
    }
}

inline void turn_row(const Step& s, const float* row, const Rotation& by, float* to) {
    std::memcpy(to, row, s.rank * sizeof(float));
    for (long g = 0; g < s.rope_groups; g++)
        turn(row + s.rank + g * s.rope, 1, by.at(0, 0, g), s.half(), to + s.rank + g * s.rope);
    std::memcpy(to + s.codes(), row + s.codes(), s.scales * sizeof(float));
}

constexpr int kLatentLevels = 63, kRopeLevels = 127;  // codes on either side of zero
constexpr float kSmallest = 1e-20f;                   // what the largest number counts for at least

// Codes of some numbers, and the scale that they are of.
inline float encode(const float* numbers, long count, int levels, uint8_t* codes) {
    Vector most = all(kSmallest);
    for (long i = 0; i < count; i += kLanes) {
        const Vector value = load(numbers + i, count - i);
        most = larger(larger(value, -value), most);
    }
    float largest = most[0];
    for (int j = 1; j < kLanes; j++) largest = std::max(largest, most[j]);
    const float scale = largest / static_cast<float>(levels);
    const Vector magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is in the lowest bits
    for (long i = 0; i < count; i += kLanes) {
        const Vector shifted = load(numbers + i, count - i) / scale + magic;
        int32_t bits[kLanes];
        std::memcpy(bits, &shifted, sizeof bits);
        const long own = std::min<long>(kLanes, count - i);
        for (long j = 0; j < own; j++) codes[i + j] = static_cast<uint8_t>(bits[j] + levels + 1);
    }
    return scale;
}

// A row's codes, and its scales: those of codes, and behind them its own.
inline void encode_row(const Step& s, const float* row, uint8_t* codes, float* scales) {
    scales[0] = encode(row, s.rank, kLatentLevels, codes);
    scales[1] = encode(row + s.rank, s.codes() - s.rank, kRopeLevels, codes + s.rank);
    std::memcpy(scales + 2, row + s.codes(), s.scales * sizeof(float));
}

// A row in two halves, the second of which is filled up with zeros.
inline void halve_row(const Step& s, const float* row, long width, float* first, float* second) {
    const auto part = [&](long begin, float* to) {
        const long count = std::clamp(s.row() - begin, 0L, width);
        std::memcpy(to, row + begin, count * sizeof(float));
        std::memset(to + count, 0, (width - count) * sizeof(float));
    };
    part(0, first);
    part(std::min(width, s.row()), second);
}

// One tensor of a cache: before the step, as attended to, and after it. Where what is attended to is the cache after
// the step, both are one memory; and so may all three be.
struct Part {
    const char* past;
    char *attended, *present;
    long bytes;  // of a row
};

// Copy the earlier rows from one to another to where they are attended to, counted over all sequences.
inline void copy_earlier(const Step& s, const Part& part, long begin, long end) {
    const bool same = part.past == part.attended && (s.batch == 1 || s.rows() == s.past);
    const bool to_ring = s.keeps == Keeps::Ring && part.past != part.present;
    for (long i = begin; i < end;) {
        const long b = i / s.past, t = i % s.past, count = std::min(end - i, s.past - t);
        const char* from = part.past + i * part.bytes;
        if (!same) std::memcpy(part.attended + (b * s.rows() + t) * part.bytes, from, count * part.bytes);
        if (to_ring) std::memcpy(part.present + i * part.bytes, from, count * part.bytes);
        i += count;
    }
}

// Keep those rows of one sequence that later queries see, where they are not attended to where they are kept.
inline void keep_rows(const Step& s, const Part& part, long b) {
    const char* rows = part.attended + b * s.rows() * part.bytes;
    char* kept = part.present + b * s.kept() * part.bytes;
    const long count = std::min(s.kept(), s.keeps == Keeps::Ring ? s.queries : s.kept()), first = s.rows() - count;
    if (!count) return;
    if (s.keeps == Keeps::Last) {
        std::memcpy(kept, rows + first * part.bytes, count * part.bytes);
        return;
    }
    for (long i = 0; i < count; i++) {
        const long slot = (s.total - count + i) % s.past;
        std::memcpy(kept + slot * part.bytes, rows + (first + i) * part.bytes, part.bytes);
    }
}

constexpr int32_t kNever = INT32_MAX;

// Runs of attended rows that hold successive tokens: `visit(row, row behind the last, token of the first)`. Tokens before
// the first and behind the last are none: such rows are empty.
template <typename Visit>
inline void each_run(const Step& s, const Visit& visit) {
    if (s.keeps == Keeps::Room) return visit(0, s.past, 0);
    if (s.keeps != Keeps::Ring) return visit(0, s.rows(), s.total - s.rows());
    if (s.past) {
        const long next = s.earlier() % s.past;  // slot, behind which those of the turn before are
        visit(0, next, s.earlier() - next);
        visit(next, s.past, s.earlier() - s.past);
    }
    visit(s.past, s.rows(), s.earlier());
}

// How many real tokens there are up to each, itself included.
inline void count_real(const Step& s, const int64_t* mask, int32_t* order) {
    int32_t count = 0;
    for (long t = 0; t < s.total; t++) order[t] = count += mask[t] > 0;
}

// Which token each attended row of one sequence holds, kNever where it is not real; and, where real tokens are counted,
// how many there are up to it.
inline void place_rows(const Step& s, const int64_t* mask, const int32_t* order, int32_t* token_T, int32_t* order_T) {
    each_run(s, [&](long first, long end, long token) {
        const long shift = token - first;
        const long begin = std::clamp(-shift, first, end), behind = std::clamp(s.total - shift, begin, end);
        std::fill(token_T + first, token_T + begin, kNever);
        std::fill(token_T + behind, token_T + end, kNever);
        for (long t = begin; t < behind; t++) token_T[t] = mask[t + shift] > 0 ? static_cast<int32_t>(t + shift) : kNever;
        if (!order) return;
        std::fill(order_T + first, order_T + begin, 0);
        std::fill(order_T + behind, order_T + end, 0);
        for (long t = begin; t < behind; t++) order_T[t] = order[t + shift];
    });
}

// Which rows a query sees: real ones of tokens before its own, in its window or chunk, and always its own. Distances
// count real tokens; null: nobody asks.
inline void see(const Step& s, long q, const int32_t* token_T, const int32_t* order_T, bool* seen_T, float* distance_T) {
    const auto own = static_cast<int32_t>(s.earlier() + q);
    const long rows = s.rows(), own_row = s.first_new() + q;
    const int32_t own_order = order_T ? order_T[own_row] : 0;
    if (s.window) {
        const long reach = s.chunked ? (own_order + s.window - 1) % s.window + 1 : s.window;
        const auto last_hidden = static_cast<int32_t>(own_order - reach);
        for (long t = 0; t < rows; t++) seen_T[t] = (token_T[t] <= own) & (order_T[t] > last_hidden);
    } else {
        for (long t = 0; t < rows; t++) seen_T[t] = token_T[t] <= own;
    }
    seen_T[own_row] = true;
    for (long t = 0; distance_T && t < rows; t++) distance_T[t] = static_cast<float>(own_order - order_T[t]);
}

}  // namespace mla
