// Folded latent attention of a few queries, in one pass over the cache: what `LatentAttention` does from rotated
// queries and rows to outputs (see mla_compile/runtime/onnx_function.py, whose suffixes name the axes here too).
//
// The cache is read in blocks of tokens that stay in the processor's cache while all heads score them, and while their
// latents are added up with the weights (Dao et al. 2022, arXiv 2205.14135: a running maximum and sum per query). A
// block's scores lie token by token, the queries of all heads side by side in the lanes of vectors: a row's number is
// multiplied with the same channel of all queries, no sum goes across lanes, and softmax is as wide as all else.
#pragma once

#include <algorithm>
#include <cmath>

#include "products.h"

namespace mla {

constexpr long kBlock = 48;          // tokens of a block
constexpr long kSplit = 1024;        // tokens that one task attends to with 64 queries; with more, it has as many more
constexpr float kNothing = -1e30f;   // a running maximum of nothing, from which -inf can be subtracted

constexpr long up_to(long count, long step) { return (count + step - 1) / step * step; }

struct Sizes {
    long batch, queries, heads, tokens, row, rank, rope, rope_groups, plain, key_groups, value_groups, value;
    long key_scales, value_scales;  // behind a row's rope keys; 0: none
    bool scaled_rope;               // whether a key's scale is of its rope key too

    long first_key_scale() const { return rank + rope_groups * rope; }
    long first_value_scale() const { return first_key_scale() + key_scales; }
    long codes() const { return first_key_scale(); }                     // of a row that is quantised
    long scales() const { return 2 + key_scales + value_scales; }        // beside them: two of codes, and those of norms
    long tile() const { return 2 * kLanes; }
    long columns() const { return queries * heads; }                     // of the scores: one per query and head
    long lanes() const { return up_to(columns(), tile()); }
    long sum() const { return up_to(rank, kColumns * kLanes); }          // length of a sum of latents, with its padding
    long split() const { return kSplit * std::max(1L, lanes() / 64); }   // tokens of a task
    long splits() const { return std::max(1L, (tokens + split() - 1) / split()); }
    long partial() const { return lanes() * (2 + sum()); }               // maxima, sums of weights, sums of latents
    long query() const { return row * lanes(); }
};

// What becomes of one sequence's scores before softmax, besides.
struct Logits {
    const bool* seen_ST;       // which tokens each query sees
    float softcap;             // they stay within it, on either side of zero; 0: whatever they are
    const float* slopes_H;     // what they lose with each token of distance; null: nothing
    const float* distance_ST;  // of tokens from queries, with slopes
};

// Up-projections of all groups: key's [G, D, r] or value's [G, r, V]. Of codes every latent channel has a scale,
// [G, r]; null: there are none.
template <typename Weight>
struct UpProjection {
    const Weight* weights;
    const float* scales_Gr;

    const Weight* of(long group, long size) const { return weights + group * size; }
    float scale(long group, long rank, long k) const { return scales_Gr ? scales_Gr[group * rank + k] : 1; }
};

// Sequences [first, last), whose rows are multiplied with a group's weights side by side.
struct Sequences {
    long first, last;

    long count() const { return last - first; }
};

// How many are in a task: a tile's rows, and several tiles' while they are of few heads.
inline long sequences(const Sizes& s, long groups) {
    return std::max(1L, 4 * kTokens / std::max(1L, s.queries * s.heads / groups));
}

// What a task of so many heads per group needs: rows of what is multiplied, and of products.
inline long product_scratch(const Sizes& s, const Sequences& all, long groups, long channels) {
    return all.count() * s.queries * s.heads / groups * (s.rank + channels);
}

// Queries of some sequences, folded with the key up-projections of one group of heads: [row, lanes] each, `stride` apart,
// of which these heads' columns are written.
template <typename Weight>
inline void fold_queries(const Sizes& s, const Sequences& all, long group, const float* plain_BSHD,
                         const UpProjection<Weight>& key_up, float* scratch, float* queries, long stride) {
    const long per_group = s.heads / s.key_groups, own = s.queries * per_group, rows = all.count() * own;
    float *plain = scratch, *folded = plain + rows * s.plain;
    for (long i = 0; i < rows; i += per_group)
        std::memcpy(plain + i * s.plain,
                    plain_BSHD + ((all.first * s.queries + i / per_group) * s.heads + group * per_group) * s.plain,
                    per_group * s.plain * sizeof(float));
    multiply(plain, key_up.of(group, s.plain * s.rank), folded, rows, s.plain, s.rank);
    for (long i = 0; i < rows; i++) {
        const long q = i % own / per_group, head = group * per_group + i % per_group;
        float* to = queries + (all.first + i / own) * stride + q * s.heads + head;
        for (long k = 0; k < s.rank; k++) to[k * s.lanes()] = folded[i * s.rank + k] * key_up.scale(group, s.rank, k);
    }
}

// The rotated channels of all heads of one sequence, each at its group's place in the row; zeros elsewhere.
inline void place_rope(const Sizes& s, long b, const float* turned_BSHd, float* query_RM) {
    float* rope = query_RM + s.rank * s.lanes();
    std::memset(rope, 0, (s.row - s.rank) * s.lanes() * sizeof(float));
    for (long m = 0; m < s.columns(); m++) {
        const long group = m % s.heads / (s.heads / s.rope_groups);
        for (long k = 0; k < s.rope; k++)
            rope[(group * s.rope + k) * s.lanes() + m] = turned_BSHd[(b * s.columns() + m) * s.rope + k];
    }
    for (long k = 0; k < s.row; k++)
        for (long m = s.columns(); m < s.lanes(); m++) query_RM[k * s.lanes() + m] = 0;
}

// Ones where a row has the scales of a head: what a row is multiplied with to give every query the scale that is its.
inline void place_scales(const Sizes& s, float* query_RM) {
    const auto place = [&](long first, long count) {
        for (long m = 0; count && m < s.columns(); m++)
            query_RM[(first + m % s.heads / (s.heads / count)) * s.lanes() + m] = 1;
    };
    place(s.first_key_scale(), s.key_scales);
    place(s.first_value_scale(), s.value_scales);
}

// Rows of some tokens: channels below the border lie on the left, [tokens, stride], and others on the right.
struct Rows {
    const float *left, *right;
    long border, stride;

    Rows from(long t) const { return {left + t * stride, right ? right + t * stride : nullptr, border, stride}; }
};

// Scores of kTokens rows with 2 kLanes queries, over channels [begin, end). While a row's line of the processor's cache
// is multiplied, what lies at `ahead(t, k)` is brought there, for token t and channel k. (A place, for compilers drop calls
// of functions that do nothing but bring it.)
template <int Tokens, typename Ahead>
inline void score_side(const float* rows, long stride, long begin, long end, const float* query, long lanes,
                       Vector (&sums)[Tokens][2], const Ahead& ahead) {
    constexpr long line = 64 / sizeof(float);
    for (long start = begin; start < end; start += line) {
        for (int t = 0; t < Tokens; t++) __builtin_prefetch(ahead(t, start));
        for (long k = start; k < std::min(start + line, end); k++) {
            Vector left = load(query + k * lanes), right = load(query + k * lanes + kLanes);
            keep(left);
            keep(right);
#pragma GCC unroll 16
            for (int t = 0; t < Tokens; t++) {
                Vector number = all(rows[t * stride + k]);
                keep(number);
                sums[t][0] += number * left;
                sums[t][1] += number * right;
            }
        }
    }
}

template <int Tokens, typename Ahead>
inline void score(const Rows& rows, long begin, long end, const float* query, long lanes, Vector (&sums)[Tokens][2],
                  const Ahead& ahead) {
    const long border = rows.border, middle = std::min(std::max(border, begin), end);
    score_side<Tokens>(rows.left, rows.stride, begin, middle, query, lanes, sums, ahead);
    if (middle < end)
        score_side<Tokens>(rows.right, rows.stride, middle - border, end - border, query + border * lanes, lanes, sums,
                           [&](long t, long k) { return ahead(t, k + border); });
}

// Multiply with every query's scale, of `count` channels of the rows.
template <int Tokens, typename Ahead>
inline void scale(const Sizes& s, const Rows& rows, long first, long count, const float* query,
                  Vector (&numbers)[Tokens][2], const Ahead& ahead) {
    Vector scales[Tokens][2] = {};
    score<Tokens>(rows, first, first + count, query, s.lanes(), scales, ahead);
    for (int t = 0; t < Tokens; t++)
        for (int j = 0; j < 2; j++) numbers[t][j] *= scales[t][j];
}

enum class Scaled { Nothing, Latent, All };  // of a key

template <Scaled Keys, int Tokens, typename Ahead>
inline void score_tile(const Sizes& s, const Rows& rows, long first_rope, long last_rope, const float* query,
                       float* scores, const Ahead& ahead) {
    Vector sums[Tokens][2] = {};
    score<Tokens>(rows, 0, s.rank, query, s.lanes(), sums, ahead);
    if constexpr (Keys == Scaled::Latent) scale<Tokens>(s, rows, s.first_key_scale(), s.key_scales, query, sums, ahead);
    score<Tokens>(rows, first_rope, last_rope, query, s.lanes(), sums, ahead);
    if constexpr (Keys == Scaled::All) scale<Tokens>(s, rows, s.first_key_scale(), s.key_scales, query, sums, ahead);
    for (int t = 0; t < Tokens; t++) {
        store(scores + t * s.lanes(), sums[t][0]);
        store(scores + t * s.lanes() + kLanes, sums[t][1]);
    }
}

// Scores of a block of tokens, from `start` on, with all queries: [tokens, lanes].
template <Scaled Keys, typename Source>
inline void score_block(const Sizes& s, const Source& source, const Rows& rows, long start, long tokens,
                        const float* query_RM, float* scores) {
    for (long lane = 0; lane < s.lanes(); lane += s.tile()) {
        // Which groups' channels these heads have; all, where they are of several queries.
        long first = 0, last = s.rope_groups - 1;
        if (s.queries == 1) {
            const long per_group = s.heads / s.rope_groups;
            first = lane / per_group;
            last = (std::min(lane + s.tile(), s.heads) - 1) / per_group;
        }
        const long begin = s.rank + first * s.rope, end = s.rank + (last + 1) * s.rope;
        const float* query = query_RM + lane;
        long t = 0;
        const auto ahead = [&](long i, long k) { return source.ahead(start + t + i, k); };
        for (; t + kTokens <= tokens; t += kTokens)
            score_tile<Keys, kTokens>(s, rows.from(t), begin, end, query, scores + t * s.lanes() + lane, ahead);
        for (; t < tokens; t++)
            score_tile<Keys, 1>(s, rows.from(t), begin, end, query, scores + t * s.lanes() + lane, ahead);
    }
}

// Weights of a tile of tokens times the scales of their values.
template <int Tokens>
inline void scale_weights(const Sizes& s, const Rows& rows, const float* query, float* weights) {
    Vector scaled[Tokens][2];
    for (int t = 0; t < Tokens; t++)
        for (int j = 0; j < 2; j++) scaled[t][j] = load(weights + t * s.lanes() + j * kLanes);
    scale<Tokens>(s, rows, s.first_value_scale(), s.value_scales, query, scaled,
                  [&](long t, long k) { return rows.left + t * rows.stride + k; });  // they are there
    for (int t = 0; t < Tokens; t++)
        for (int j = 0; j < 2; j++) store(weights + t * s.lanes() + j * kLanes, scaled[t][j]);
}

inline void scale_block(const Sizes& s, const Rows& rows, long tokens, const float* query_RM, float* weights) {
    for (long lane = 0; lane < s.lanes(); lane += s.tile()) {
        long t = 0;
        for (; t + kTokens <= tokens; t += kTokens)
            scale_weights<kTokens>(s, rows.from(t), query_RM + lane, weights + t * s.lanes() + lane);
        for (; t < tokens; t++)
            scale_weights<1>(s, rows.from(t), query_RM + lane, weights + t * s.lanes() + lane);
    }
}

// Hide tokens from queries that do not see them; false if no query sees any of them.
inline bool mask_block(const Sizes& s, const bool* seen_ST, long tokens, float* scores) {
    bool any = false;
    for (long q = 0; q < s.queries; q++) {
        const bool* seen = seen_ST + q * s.tokens;
        if (!std::memchr(seen, 0, tokens)) {
            any = true;
            continue;
        }
        for (long t = 0; t < tokens; t++) {
            any |= seen[t];
            if (!seen[t] && scores)
                std::fill_n(scores + t * s.lanes() + q * s.heads, s.heads, -__builtin_inff());
        }
    }
    return any;
}

// From the scores of a block, which begins with token `first`, to logits.
inline void finish_scores(const Sizes& s, const Logits& logits, long first, long tokens, float* scores) {
    if (logits.softcap) {
        const float share = 1 / logits.softcap;
        for (long i = 0; i < tokens * s.lanes(); i += kLanes)
            store(scores + i, hyperbolic_tangent(load(scores + i) * share) * logits.softcap);
    }
    if (logits.slopes_H)
        for (long q = 0; q < s.queries; q++) {
            const float* distance = logits.distance_ST + q * s.tokens + first;
            for (long t = 0; t < tokens; t++) {
                float* of_heads = scores + t * s.lanes() + q * s.heads;
                for (long h = 0; h < s.heads; h++) of_heads[h] -= distance[t] * logits.slopes_H[h];
            }
        }
    mask_block(s, logits.seen_ST + first, tokens, scores);
}

inline void begin_partial(const Sizes& s, float* partial) {
    std::fill_n(partial, s.lanes(), kNothing);
    std::fill_n(partial + s.lanes(), s.lanes() * (1 + s.sum()), 0.0f);
}

// From scores to weights relative to the new running maxima; `shrink` is what earlier sums are to be multiplied with.
inline void soften(const Sizes& s, long tokens, float* scores, float* maxima, float* totals, float* shrink) {
    for (long lane = 0; lane < s.lanes(); lane += kLanes) {
        const Vector before = load(maxima + lane);
        Vector most = before;
        for (long t = 0; t < tokens; t++) most = larger(most, load(scores + t * s.lanes() + lane));
        const Vector factor = exponential(before - most);
        Vector total = load(totals + lane) * factor;
        for (long t = 0; t < tokens; t++) {
            const Vector weight = exponential(load(scores + t * s.lanes() + lane) - most);
            store(scores + t * s.lanes() + lane, weight);
            total += weight;
        }
        store(maxima + lane, most);
        store(totals + lane, total);
        store(shrink + lane, factor);
    }
}

// Add kColumns kLanes channels of a block's latents to the sums of kHeads columns.
inline void add_tile(long tokens, const float* latents, long stride, const float* weights, long lanes,
                     const float* shrink, float* sums, long sum_stride) {
    Vector tile[kHeads][kColumns];
    for (int h = 0; h < kHeads; h++)
        for (int j = 0; j < kColumns; j++) tile[h][j] = load(sums + h * sum_stride + j * kLanes) * shrink[h];
    for (long t = 0; t < tokens; t++) {
        Vector latent[kColumns];
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; j++) {
            latent[j] = load(latents + t * stride + j * kLanes);
            keep(latent[j]);
        }
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; h++) {
            Vector weight = all(weights[t * lanes + h]);
            keep(weight);
#pragma GCC unroll 8
            for (int j = 0; j < kColumns; j++) tile[h][j] += weight * latent[j];
        }
    }
    for (int h = 0; h < kHeads; h++)
        for (int j = 0; j < kColumns; j++) store(sums + h * sum_stride + j * kLanes, tile[h][j]);
}

// Some channels of rows, to be read in one piece: as many of `count` as are latents, and zeros.
inline void copy_strip(const Rows& rows, long tokens, long column, long latents, long count, float* to) {
    const long middle = std::min(std::max(rows.border, column), latents);
    for (long t = 0; t < tokens; t++) {
        float* row = to + t * count;
        std::memcpy(row, rows.left + t * rows.stride + column, (middle - column) * sizeof(float));
        if (middle < latents)
            std::memcpy(row + middle - column, rows.right + t * rows.stride + middle - rows.border,
                        (latents - middle) * sizeof(float));
        std::memset(row + latents - column, 0, (column + count - latents) * sizeof(float));
    }
}

inline void add_block(const Sizes& s, const Rows& rows, long tokens, const float* weights, const float* shrink,
                      float* sums, float* scratch) {
    constexpr long strip = kColumns * kLanes;
    for (long column = 0; column < s.rank; column += strip) {
        const long end = column + strip;
        const bool on_right = column >= rows.border;
        const float* latents = on_right ? rows.right + column - rows.border : rows.left + column;
        long stride = rows.stride;
        // What is behind the latent is not to be added, nor to be read behind the cache.
        if (end > s.rank || (!on_right && end > rows.border)) {
            copy_strip(rows, tokens, column, std::min(end, s.rank), strip, scratch);
            latents = scratch;
            stride = strip;
        }
        for (long h = 0; h < s.columns(); h += kHeads)
            add_tile(tokens, latents, stride, weights + h, s.lanes(), shrink + h, sums + h * s.sum() + column, s.sum());
    }
}

// One task: attend to a split of the tokens of one sequence. `partial` is [maxima | totals | sums of latents]. A source
// is what the cache holds: `rows(t, tokens)` are those of some tokens from one on, at most kBlock, and `ahead(t, k)` is
// the place to read next while channel k of token t is multiplied.
template <Scaled Keys, typename Source>
inline void attend_blocks(const Sizes& s, long split, const Logits& logits, const float* query_RM, float* partial,
                          float* scratch, const Source& source) {
    float *maxima = partial, *totals = partial + s.lanes(), *sums = partial + 2 * s.lanes();
    float *scores = scratch, *shrink = scores + kBlock * s.lanes(), *strip = shrink + s.lanes();
    begin_partial(s, partial);
    const long end = std::min((split + 1) * s.split(), s.tokens);
    for (long t = split * s.split(); t < end; t += kBlock) {
        const long tokens = std::min(kBlock, end - t);
        if (!mask_block(s, logits.seen_ST + t, tokens, nullptr)) continue;
        const Rows rows = source.rows(t, tokens);
        score_block<Keys>(s, source, rows, t, tokens, query_RM, scores);
        finish_scores(s, logits, t, tokens, scores);
        soften(s, tokens, scores, maxima, totals, shrink);
        if (s.value_scales) scale_block(s, rows, tokens, query_RM, scores);
        add_block(s, rows, tokens, scores, shrink, sums, strip);
    }
}

template <typename Source>
inline void attend_scaled(const Sizes& s, long split, const Logits& logits, const float* query_RM, float* partial,
                          float* scratch, const Source& source) {
    if (!s.key_scales)
        attend_blocks<Scaled::Nothing>(s, split, logits, query_RM, partial, scratch, source);
    else if (s.scaled_rope)
        attend_blocks<Scaled::All>(s, split, logits, query_RM, partial, scratch, source);
    else
        attend_blocks<Scaled::Latent>(s, split, logits, query_RM, partial, scratch, source);
}

inline long attend_scratch(const Sizes& s) {
    return kBlock * s.lanes() + s.lanes() + kBlock * kColumns * kLanes;
}

struct Whole {
    const float* from;
    long row;

    Rows rows(long t, long) const { return {from + t * row, nullptr, row, row}; }
    const float* ahead(long t, long k) const { return from + (t + kTokens) * row + k; }
};

inline void attend(const Sizes& s, long split, const float* rows, const Logits& logits, const float* query_RM,
                   float* partial, float* scratch) {
    attend_scaled(s, split, logits, query_RM, partial, scratch, Whole{rows, s.row});
}

// Rows that are copied, a block at a time: what is read ahead is the next block's.
inline long attend_copies_scratch(const Sizes& s) { return attend_scratch(s) + kBlock * s.row; }

// In float16, which becomes numbers.
struct Widened {
    const Half* from;
    long row;
    float* to;

    Rows rows(long t, long tokens) const {
        widen(from + t * row, tokens * row, to);
        return {to, nullptr, row, row};
    }
    const Half* ahead(long t, long k) const { return from + (t + kBlock) * row + k; }
};

inline void attend_halves(const Sizes& s, long split, const Half* halves, const Logits& logits, const float* query_RM,
                          float* partial, float* scratch) {
    const Widened source{halves, s.row, scratch + attend_scratch(s)};
    attend_scaled(s, split, logits, query_RM, partial, scratch, source);
}

// In two halves [tokens, width], behind whose own numbers there may be others.
struct Paired {
    const float *first, *second;
    long width;

    Rows rows(long t, long) const { return Rows{first, second, width, width}.from(t); }
    const float* ahead(long t, long k) const {
        return (k < width ? first + k : second + k - width) + (t + kTokens) * width;
    }
};

inline void attend_pairs(const Sizes& s, long split, const float* first, const float* second, long width,
                         const Logits& logits, const float* query_RM, float* partial, float* scratch) {
    attend_scaled(s, split, logits, query_RM, partial, scratch, Paired{first, second, width});
}

// Merge the splits of some sequences for the heads of one group, and unfold the sums with its value up-projection. A sink
// is one more logit of its head, without a value; null: there are none. A sequence's partials are `stride` from the next's.
template <typename Weight>
inline void unfold_output(const Sizes& s, const Sequences& all, long group, const float* partials, long stride,
                          const UpProjection<Weight>& value_up, const float* sinks_H, float* scratch,
                          float* output_BSHV) {
    const long per_group = s.heads / s.value_groups, own = s.queries * per_group, rows = all.count() * own;
    float *sums = scratch, *values = sums + rows * s.rank;
    for (long i = 0; i < rows; i++) {
        const float* splits = partials + (all.first + i / own) * stride;
        const long head = group * per_group + i % per_group, m = i % own / per_group * s.heads + head;
        float most = sinks_H ? std::max(kNothing, sinks_H[head]) : kNothing;
        for (long j = 0; j < s.splits(); j++) most = std::max(most, splits[j * s.partial() + m]);
        float total = sinks_H ? std::exp(sinks_H[head] - most) : 0;
        float* merged = sums + i * s.rank;
        std::memset(merged, 0, s.rank * sizeof(float));
        for (long j = 0; j < s.splits(); j++) {
            const float* partial = splits + j * s.partial();
            const float share = std::exp(partial[m] - most);
            const float* latents = partial + 2 * s.lanes() + m * s.sum();
            total += share * partial[s.lanes() + m];
            for (long k = 0; k < s.rank; k++) merged[k] += share * latents[k];
        }
        for (long k = 0; k < s.rank; k++) merged[k] *= value_up.scale(group, s.rank, k) / total;
    }
    multiply(sums, value_up.of(group, s.rank * s.value), values, rows, s.rank, s.value);
    for (long i = 0; i < rows; i += per_group)
        std::memcpy(output_BSHV + ((all.first * s.queries + i / per_group) * s.heads + group * per_group) * s.value,
                    values + i * s.value, per_group * s.value * sizeof(float));
}

}  // namespace mla
