// Operators that make of a step's inputs what attention to a latent cache takes, and write the new rows to the cache.
//
// PrepareAttention: queries [B, S, H, D], new rows [B, S, R], the cache [B, P, R], the mask over all tokens [B, T]
// (int64), cosines and sines [B, S, n, d / 2], key up-projections [G, D - d, r] and value up-projections [G', r, V], of
// which the sizes alone are read; outputs: plain queries [B, S, H, D - d] and turned ones [B, S, n, h, d], scaled both;
// whether there are so many queries that making keys and values of the rows pays; which rows each query sees
// [B, S, T]; the cache after the step.
// PrepareAttentionOfHalves: the same with a cache in float16. All else is float32 there too.
// PrepareAttentionOfCodes: the same with a cache of codes (uint8), of which the scales [B, P, 2 + m + w] are one more
// input, and one more output.
// PrepareAttentionOfPairs: the same with a cache of two halves [B, 1, P, W], of which the second is one more input, and
// one more output; behind a row's own numbers there may be others, and are zeros in new rows.
// Optional outputs of all: with slopes, distances of tokens from queries [B, S, T]; with a window whose cache has no
// more rows than it shows, the rows to attend to, and their scales.
// Attributes: scale, rope_groups (n), rope_dim (d), latent_rank (r); optional ones: key_scales (m) and value_scales (w);
// window, and whether it is chunked; static; has_slopes.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "attention.h"
#include "prepare.h"

namespace operators {

struct Preparation {
    ort::Table table;
    float scale;
    int64_t rope_groups, rope_dim, latent_rank, key_scales, value_scales, window, chunked, is_static, has_slopes;
};

// Beside: what belongs to rows besides, scales of codes or second halves.
struct Given {
    enum Place : size_t { Query, Row, Past, Mask, Cos, Sin, KeyUp, ValueUp, Beside, Count };
};
struct Made {
    enum Place : size_t { Plain, Turned, Many, Seen, Present, Beside, Distance, Rows, RowsBeside, Count };
};

// What such an operator is called, and what a second tensor of its cache has.
template <typename Form>
constexpr const char* prepare_name = nullptr;
template <>
constexpr const char* prepare_name<Numbers> = "PrepareAttention";
template <>
constexpr const char* prepare_name<Halves> = "PrepareAttentionOfHalves";
template <>
constexpr const char* prepare_name<Codes> = "PrepareAttentionOfCodes";
template <>
constexpr const char* prepare_name<Pairs> = "PrepareAttentionOfPairs";
template <typename Form>
constexpr bool has_beside = quantised<Form> || paired<Form>;

// Run `task(begin, end)` over so many things of so many numbers each. What is little is done at once: to wake other
// threads takes longer.
template <typename Task>
void spread(const ort::Call& call, long count, long numbers, Task task) {
    constexpr long few = 1 << 16, piece = 1 << 14;
    if (count * numbers <= few) {
        if (count) task(0L, count);
        return;
    }
    const long step = std::max(1L, piece / std::max(1L, numbers)), tasks = (count + step - 1) / step;
    call.each(tasks, [&](long i) { task(i * step, std::min(count, (i + 1) * step)); });
}

// Cosines or sines: of a size that is one, the only ones are all others' too.
mla::Rotation rotation_of(const ort::Call& call, const mla::Step& s) {
    const auto sizes = call.shape(Given::Cos, "cosines", 4);
    const auto fits = [&](size_t axis, long whole) { return sizes[axis] == whole || sizes[axis] == 1; };
    if (!fits(0, s.batch) || !fits(1, s.queries) || !fits(2, s.rope_groups) || sizes[3] != s.half())
        call.refuse_sizes("cosines");
    call.require(Given::Sin, "sines", sizes);
    const long group = sizes[3], token = sizes[2] * group, sequence = sizes[1] * token;
    return {call.data<float>(call.input(Given::Cos)), call.data<float>(call.input(Given::Sin)),
            sizes[0] == 1 ? 0 : sequence, sizes[1] == 1 ? 0 : token, sizes[2] == 1 ? 0 : group};
}

// Where the tokens of a step are to lie in the cache.
template <typename Form>
mla::Keeps keeps_of(const Preparation& kernel) {
    const bool drops = kernel.window && !paired<Form>;
    if (kernel.is_static) return drops ? mla::Keeps::Ring : mla::Keeps::Room;
    return drops ? mla::Keeps::Last : mla::Keeps::All;
}

template <typename Form>
mla::Step step_of(const ort::Call& call, const Preparation& kernel) {
    const auto query = call.shape(Given::Query, "queries", 4),
               past = call.shape(Given::Past, "cache", 3 + paired<Form>),
               mask = call.shape(Given::Mask, "mask", 2), key_up = call.shape(Given::KeyUp, names[KeyUp], 3),
               value_up = call.shape(Given::ValueUp, names[ValueUp], 3);
    const mla::Step s{query[0], query[1], query[2], key_up[1], kernel.rope_dim, kernel.rope_groups, kernel.latent_rank,
                      kernel.key_scales + kernel.value_scales, past[past.size() - 2], mask[1],
                      std::min<int64_t>(kernel.window, INT32_MAX), kernel.chunked != 0, keeps_of<Form>(kernel)};
    if (s.rope_groups < 1 || s.heads % s.rope_groups || s.rope < 0 || s.rope % 2 || kernel.key_scales < 0 ||
        kernel.value_scales < 0 || s.window < 0)
        call.refuse("attention: rope_groups do not divide the heads, or an attribute is no size");
    call.require(Given::Query, "queries", {s.batch, s.queries, s.heads, s.channels()});
    call.require(Given::Row, "rows", {s.batch, s.queries, s.row()});
    if (key_up[2] != s.rank) call.refuse_sizes(names[KeyUp]);
    if (value_up[1] != s.rank) call.refuse_sizes(names[ValueUp]);
    const long scales = 2 + s.scales, width = past.back();
    if constexpr (paired<Form>) {
        call.require(Given::Past, "cache", {s.batch, 1, s.past, std::max(width, (s.row() + 1) / 2)});
        call.require(Given::Beside, names[Beside], {s.batch, 1, s.past, width});
    } else {
        call.require(Given::Past, "cache", {s.batch, s.past, quantised<Form> ? s.codes() : s.row()});
    }
    if constexpr (quantised<Form>) call.require(Given::Beside, names[Beside], {s.batch, s.past, scales});
    if (mask[0] != 1) call.require(Given::Mask, "mask", {s.batch, s.total});
    if (s.total < s.queries || s.total > INT32_MAX || (s.keeps == mla::Keeps::All && s.total != s.rows()) ||
        (s.keeps == mla::Keeps::Last && s.total < s.rows()))
        call.refuse_sizes("mask");
    if (s.keeps == mla::Keeps::Room && s.total > s.past)
        call.refuse("attention: the cache has room for " + std::to_string(s.past) + " tokens, and there are " +
                    std::to_string(s.total));
    return s;
}

// A query and a row take two rows' numbers per head where folded, and a key's and a value's where not; keys and values
// are made once.
bool pays_to_unfold(const ort::Call& call, const mla::Step& s) {
    const auto key_up = call.shape(Given::KeyUp), value_up = call.shape(Given::ValueUp);
    const int64_t saved = (2 * s.row() - s.channels() - value_up[2]) * s.heads * s.queries;
    return saved > (key_up[0] * key_up[1] + value_up[0] * value_up[2]) * s.rank;
}

void prepare_queries(const ort::Call& call, const Preparation& kernel, const mla::Step& s, const mla::Rotation& rotation) {
    const auto* query = call.data<float>(call.input(Given::Query));
    auto* plain = call.output<float>(Made::Plain, {s.batch, s.queries, s.heads, s.plain});
    auto* turned = call.output<float>(
        Made::Turned, {s.batch, s.queries, s.rope_groups, s.heads / s.rope_groups, s.rope});
    spread(call, s.batch * s.queries, s.heads * s.channels(), [&](long begin, long end) {
        for (long i = begin; i < end; i++)
            mla::prepare_query(s, query + i * s.heads * s.channels(), kernel.scale,
                               rotation.at(i / s.queries, i % s.queries, 0), plain + i * s.heads * s.plain,
                               turned + i * s.heads * s.rope);
    });
}

// One tensor of the cache: an input [B, (1,) P, w], and as an output as long as is kept.
template <typename Element>
mla::Part part_of(const ort::Call& call, const mla::Step& s, Given::Place past, Made::Place present, Made::Place rows) {
    auto sizes = call.shape(past);
    const size_t tokens = sizes.size() - 2;
    mla::Part part{};
    part.bytes = sizes.back() * static_cast<long>(sizeof(Element));
    part.past = reinterpret_cast<const char*>(call.data<Element>(call.input(past)));
    sizes[tokens] = s.kept();
    part.present = reinterpret_cast<char*>(call.output<Element>(present, sizes));
    sizes[tokens] = s.rows();
    part.attended = s.apart() ? reinterpret_cast<char*>(call.output<Element>(rows, sizes)) : part.present;
    return part;
}

// Rotate the new rows and write them to the cache, in its form.
template <typename Form>
void append(const ort::Call& call, const mla::Step& s, const mla::Rotation& rotation) {
    const mla::Part own = part_of<typename Form::Row>(call, s, Given::Past, Made::Present, Made::Rows);
    mla::Part beside{};
    if constexpr (has_beside<Form>) beside = part_of<float>(call, s, Given::Beside, Made::Beside, Made::RowsBeside);
    const auto each_part = [&](const auto& run) {
        run(own);
        if constexpr (has_beside<Form>) run(beside);
    };
    each_part([&](const mla::Part& part) {
        spread(call, s.batch * s.past, part.bytes / static_cast<long>(sizeof(float)),
               [&](long begin, long end) { mla::copy_earlier(s, part, begin, end); });
    });
    const auto* row = call.data<float>(call.input(Given::Row));
    spread(call, s.batch * s.queries, s.row(), [&](long begin, long end) {
        mla::Borrowed scratch(s.row());
        for (long i = begin; i < end; i++) {
            const long b = i / s.queries, q = i % s.queries, place = b * s.rows() + s.first_new() + q;
            auto* to = reinterpret_cast<typename Form::Row*>(own.attended + place * own.bytes);
            [[maybe_unused]] auto* to_beside = reinterpret_cast<float*>(beside.attended + place * beside.bytes);
            float* turned = scratch.data();
            if constexpr (std::is_same_v<Form, Numbers>) turned = to;
            mla::turn_row(s, row + i * s.row(), rotation.at(b, q, 0), turned);
            if constexpr (quantised<Form>) mla::encode_row(s, turned, to, to_beside);
            if constexpr (paired<Form>)
                mla::halve_row(s, turned, own.bytes / static_cast<long>(sizeof(float)), to, to_beside);
            if constexpr (std::is_same_v<Form, Halves>) mla::narrow(turned, s.row(), to);
        }
    });
    if (s.apart())
        each_part([&](const mla::Part& part) {
            for (long b = 0; b < s.batch; b++) mla::keep_rows(s, part, b);
        });
}

// Which rows each query sees, and how far away they are: of every sequence, or of all at once where they have one mask.
void mask_rows(const ort::Call& call, const Preparation& kernel, const mla::Step& s) {
    const long masks = call.shape(Given::Mask)[0], rows = s.rows();
    const auto* mask = call.data<int64_t>(call.input(Given::Mask));
    auto* seen = call.output<bool>(Made::Seen, {masks, s.queries, rows});
    float* distance = kernel.has_slopes ? call.output<float>(Made::Distance, {masks, s.queries, rows}) : nullptr;
    const bool counted = s.window || distance;
    mla::Borrowed memory(masks * (2 * rows + s.total));
    auto* tokens = reinterpret_cast<int32_t*>(memory.data());
    int32_t *orders = tokens + masks * rows, *counts = orders + masks * rows;
    spread(call, masks, rows + s.total, [&](long begin, long end) {
        for (long b = begin; b < end; b++) {
            int32_t* count = counted ? counts + b * s.total : nullptr;
            if (counted) mla::count_real(s, mask + b * s.total, count);
            mla::place_rows(s, mask + b * s.total, count, tokens + b * rows, orders + b * rows);
        }
    });
    spread(call, masks * s.queries, rows, [&](long begin, long end) {
        for (long i = begin; i < end; i++) {
            const long b = i / s.queries;
            mla::see(s, i % s.queries, tokens + b * rows, counted ? orders + b * rows : nullptr, seen + i * rows,
                     distance ? distance + i * rows : nullptr);
        }
    });
}

template <typename Form>
void prepare(const ort::Call& call, const Preparation& kernel) {
    const mla::Step s = step_of<Form>(call, kernel);
    const mla::Rotation rotation = rotation_of(call, s);
    *call.output<bool>(Made::Many, {}) = pays_to_unfold(call, s);
    prepare_queries(call, kernel, s, rotation);
    append<Form>(call, s, rotation);
    mask_rows(call, kernel, s);
}

template <typename Form>
ort::Operator prepare_attention() {
    ort::Operator made = ort::operator_of<Preparation, prepare<Form>>();
    made.name = [](const ort::Operator*) { return prepare_name<Form>; };
    made.input_type = [](const ort::Operator*, size_t index) {
        if (index == Given::KeyUp || index == Given::ValueUp) return ort::Element::Any;
        if (index == Given::Mask) return ort::Element::Int64;
        return index == Given::Past ? Form::element : ort::Element::Float;
    };
    made.input_count = [](const ort::Operator*) { return size_t{Given::Count} - !has_beside<Form>; };
    made.input_kind = [](const ort::Operator*, size_t) { return ort::kRequired; };
    made.output_type = [](const ort::Operator*, size_t index) {
        if (index == Made::Many || index == Made::Seen) return ort::Element::Bool;
        return index == Made::Present || index == Made::Rows ? Form::element : ort::Element::Float;
    };
    made.output_count = [](const ort::Operator*) { return size_t{Made::Count}; };
    made.output_kind = [](const ort::Operator*, size_t index) {
        return index < Made::Beside + has_beside<Form> ? ort::kRequired : ort::kOptional;
    };
    made.create_checked = [](const ort::Operator*, ort::Table table, const ort::KernelInfo* info,
                             void** kernel) -> ort::Status* {
        const auto count = [&](const char* name) {
            return ort::attribute<int64_t>(table, info, ort::Place::KernelInfoGetAttributeInt64, name);
        };
        const auto scale = ort::attribute<float>(table, info, ort::Place::KernelInfoGetAttributeFloat, "scale");
        *kernel = new Preparation{table, scale, count("rope_groups"), count("rope_dim"), count("latent_rank"),
                                  count("key_scales"), count("value_scales"), count("window"), count("chunked"),
                                  count("static"), count("has_slopes")};
        return nullptr;
    };
    return made;
}

}  // namespace operators
