// Operators that attend to rows of a latent cache.
//
// FoldedAttention: plain queries [B, S, H, D], turned queries [B, S, n, h, d], rows [B, T, R], which of them each
// query sees [B, S, T] (bool), key up-projections [G, D, r], value up-projections [G', r, V]; output [B, S, H, V].
// Up-projections are float32, float16, or int8 with scales.
// FoldedAttentionOfHalves: the same with rows in float16. All else is float32 there too.
// FoldedAttentionOfCodes: the same with codes (uint8) for rows, and behind these inputs their scales [B, T, 2 + m + w].
// FoldedAttentionOfPairs: the same with rows in two halves [B, 1, T, W], of which the second stand behind these inputs;
// behind a row's own numbers a pair of halves may have others.
// Optional inputs of all, behind those or nothing in their place: sinks [H]; slopes [H], and with them distances of
// tokens from queries [B, S, T]; scales of key up-projections [G, 1, r] and of value up-projections [G', r, 1].
// Optional attributes: softcap; how many key_scales (m) and value_scales (w) a row ends in, or stand behind the scales
// of its codes; and scaled_rope.
#pragma once

#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "call.h"
#include "folded_codes.h"
#include "memory.h"

namespace operators {

struct Kernel {
    ort::Table table;
    int64_t key_scales, value_scales, scaled_rope;
    float softcap;
};

// What rows are, and so which operator it is.
struct Numbers {
    using Row = float;
    static constexpr ort::Element element = ort::Element::Float;
    static constexpr const char* name = "FoldedAttention";
};

struct Halves {
    using Row = mla::Half;
    static constexpr ort::Element element = ort::Element::Float16;
    static constexpr const char* name = "FoldedAttentionOfHalves";
};

struct Codes {
    using Row = uint8_t;
    static constexpr ort::Element element = ort::Element::UInt8;
    static constexpr const char* name = "FoldedAttentionOfCodes";
};

struct Pairs {
    using Row = float;
    static constexpr ort::Element element = ort::Element::Float;
    static constexpr const char* name = "FoldedAttentionOfPairs";
};

template <typename Form>
constexpr bool quantised = std::is_same_v<Form, Codes>;
template <typename Form>
constexpr bool paired = std::is_same_v<Form, Pairs>;

// Inputs of all operators, in order. Beside: what belongs to rows besides, scales of codes or second halves.
enum Input : size_t {
    Plain, Turned, Rows, Seen, KeyUp, ValueUp, Beside, Sinks, Slopes, Distance, KeyUpScales, ValueUpScales, Inputs
};

constexpr const char* names[] = {"queries", "turned queries", "rows", "mask", "key up-projections",
                                 "value up-projections", "scales or second halves", "sinks", "slopes", "distances",
                                 "scales of key up-projections", "scales of value up-projections"};

void require(const ort::Call& call, Input input, const std::vector<int64_t>& sizes) {
    call.require(input, names[input], sizes);
}

// How far the numbers of one sequence are from those of the next; one sequence's are all others' too.
long of_each(const ort::Call& call, Input input, const mla::Sizes& s) {
    const bool shared = call.shape(input)[0] == 1;
    require(call, input, {shared ? 1 : s.batch, s.queries, s.tokens});
    return shared ? 0 : s.queries * s.tokens;
}

// Whether all inputs are as large as s says, which is read from five of them, with W of the halves of rows.
template <typename Form>
void require_sizes(const ort::Call& call, const mla::Sizes& s, long width, bool sinks, bool slopes) {
    for (long groups : {s.key_groups, s.value_groups, s.rope_groups})
        if (groups < 1 || s.heads % groups)
            call.refuse("attention: " + std::to_string(s.heads) + " heads are no whole number for each of " +
                        std::to_string(groups) + " groups.");
    require(call, Turned, {s.batch, s.queries, s.rope_groups, s.heads / s.rope_groups, s.rope});
    if constexpr (paired<Form>) {
        require(call, Rows, {s.batch, 1, s.tokens, std::max(width, (s.row + 1) / 2)});
        require(call, Beside, {s.batch, 1, s.tokens, width});
    } else {
        require(call, Rows, {s.batch, s.tokens, quantised<Form> ? s.codes() : s.row});
    }
    require(call, KeyUp, {s.key_groups, s.plain, s.rank});
    require(call, ValueUp, {s.value_groups, s.rank, s.value});
    if (quantised<Form>) require(call, Beside, {s.batch, s.tokens, s.scales()});
    if (sinks) require(call, Sinks, {s.heads});
    if (slopes) require(call, Slopes, {s.heads});
}

// Tasks of some sequences and one of so many groups of heads each.
template <typename Task>
void for_groups(const ort::Call& call, const mla::Sizes& s, long groups, Task task) {
    const long each = mla::sequences(s, groups), parts = (s.batch + each - 1) / each;
    call.each(groups * parts, [&](long index) {
        const long first = index % parts * each;
        task(mla::Sequences{first, std::min(first + each, s.batch)}, index / parts);
    });
}

// Call a task with the up-projections of one kind, whatever numbers they are, [G, ...]; their scales, where they are
// codes, have the sizes given.
template <typename Task>
void with_up_projection(const ort::Call& call, Input input, Input scales, const std::vector<int64_t>& sizes, Task task) {
    ort::Value* value = call.input(input);
    switch (call.element(input)) {
        case ort::Element::Float:
            return task(mla::UpProjection<float>{call.data<float>(value), nullptr});
        case ort::Element::Float16:
            return task(mla::UpProjection<mla::Half>{call.data<mla::Half>(value), nullptr});
        case ort::Element::Int8: {
            const float* found = call.optional(scales);
            if (!found) call.refuse(std::string("attention: there are no ") + names[scales] + ", which are int8.");
            require(call, scales, sizes);
            return task(mla::UpProjection<int8_t>{call.data<int8_t>(value), found});
        }
        default:
            call.refuse(std::string("attention: ") + names[input] + " are neither float32, float16 nor int8.");
    }
}

template <typename Form>
void attention(const ort::Call& call, const Kernel& kernel) {
    const auto sizes = [&](Input input, size_t rank) { return call.shape(input, names[input], rank); };
    const auto plain = sizes(Plain, 4), turned = sizes(Turned, 5), rows = sizes(Rows, 3 + paired<Form>),
               key_up = sizes(KeyUp, 3), value_up = sizes(ValueUp, 3);
    const int64_t tokens = rows[rows.size() - 2], width = rows.back();
    const int64_t row = key_up[2] + turned[2] * turned[4] + kernel.key_scales + kernel.value_scales;
    const mla::Sizes s{plain[0],  plain[1],  plain[2], tokens,    row,         key_up[2],
                       turned[4], turned[2], plain[3], key_up[0], value_up[0], value_up[2],
                       kernel.key_scales, kernel.value_scales, kernel.scaled_rope != 0};
    const auto *plain_data = call.data<float>(call.input(Plain)), *turned_data = call.data<float>(call.input(Turned));
    const bool* seen_data = call.data<bool>(call.input(Seen));
    const float *sinks = call.optional(Sinks), *slopes = call.optional(Slopes), *distance = call.optional(Distance);
    const auto* rows_data = call.data<typename Form::Row>(call.input(Rows));
    require_sizes<Form>(call, s, width, sinks, slopes);
    const long seen_each = of_each(call, Seen, s), distance_each = slopes ? of_each(call, Distance, s) : 0;
    float* output = call.output<float>(0, {s.batch, s.queries, s.heads, s.value});

    const long query_size = quantised<Form> ? mla::code_query(s) : s.query();
    mla::Borrowed memory(s.batch * (query_size + s.splits() * s.partial()));
    float *queries = memory.data(), *partials = queries + s.batch * query_size;
    with_up_projection(call, KeyUp, KeyUpScales, {s.key_groups, 1, s.rank}, [&](const auto& up) {
        for_groups(call, s, s.key_groups, [&](const mla::Sequences& all, long group) {
            mla::Borrowed scratch(mla::product_scratch(s, all, s.key_groups, s.plain));
            mla::fold_queries(s, all, group, plain_data, up, scratch.data(), queries, query_size);
        });
    });
    call.each(s.batch, [&](long b) {
        float* query = queries + b * query_size;
        mla::place_rope(s, b, turned_data, query);
        mla::place_scales(s, query);
        if constexpr (quantised<Form>) mla::encode_queries(s, query);
    });
    call.each(s.batch * s.splits(), [&](long task) {
        const long b = task / s.splits(), split = task % s.splits();
        const auto* own_rows = rows_data + b * s.tokens * width;
        const mla::Logits logits{seen_data + b * seen_each, kernel.softcap, slopes,
                                 slopes ? distance + b * distance_each : nullptr};
        const float* query = queries + b * query_size;
        float* partial = partials + task * s.partial();
        if constexpr (quantised<Form>) {
            const float* scales = call.data<float>(call.input(Beside)) + b * s.tokens * s.scales();
            mla::Borrowed scratch(mla::attend_codes_scratch(s));
            mla::attend_codes(s, split, own_rows, scales, logits, query, partial, scratch.data());
        } else if constexpr (paired<Form>) {
            const float* second = call.data<float>(call.input(Beside)) + b * s.tokens * width;
            mla::Borrowed scratch(mla::attend_scratch(s));
            mla::attend_pairs(s, split, own_rows, second, width, logits, query, partial, scratch.data());
        } else if constexpr (std::is_same_v<Form, Halves>) {
            mla::Borrowed scratch(mla::attend_copies_scratch(s));
            mla::attend_halves(s, split, own_rows, logits, query, partial, scratch.data());
        } else {
            mla::Borrowed scratch(mla::attend_scratch(s));
            mla::attend(s, split, own_rows, logits, query, partial, scratch.data());
        }
    });
    with_up_projection(call, ValueUp, ValueUpScales, {s.value_groups, s.rank, 1}, [&](const auto& up) {
        for_groups(call, s, s.value_groups, [&](const mla::Sequences& all, long group) {
            mla::Borrowed scratch(mla::product_scratch(s, all, s.value_groups, s.value));
            mla::unfold_output(s, all, group, partials, s.splits() * s.partial(), up, sinks, scratch.data(), output);
        });
    });
}

template <typename Form>
ort::Operator folded_attention() {
    ort::Operator made = ort::operator_of<Kernel, attention<Form>>();
    made.name = [](const ort::Operator*) { return Form::name; };
    made.input_type = [](const ort::Operator*, size_t index) {
        if (index == Seen) return ort::Element::Bool;
        if (index == KeyUp || index == ValueUp) return ort::Element::Any;
        return index == Rows ? Form::element : ort::Element::Float;
    };
    made.input_count = [](const ort::Operator*) { return size_t{Inputs}; };
    made.output_type = [](const ort::Operator*, size_t) { return ort::Element::Float; };
    made.output_count = [](const ort::Operator*) { return size_t{1}; };
    made.input_kind = [](const ort::Operator*, size_t index) {
        return index < (quantised<Form> || paired<Form> ? Sinks : Beside) ? ort::kRequired : ort::kOptional;
    };
    made.create_checked = [](const ort::Operator*, ort::Table table, const ort::KernelInfo* info,
                             void** kernel) -> ort::Status* {
        const auto count = [&](const char* name) {
            return ort::attribute<int64_t>(table, info, ort::Place::KernelInfoGetAttributeInt64, name);
        };
        *kernel = new Kernel{table, count("key_scales"), count("value_scales"), count("scaled_rope"),
                             ort::attribute<float>(table, info, ort::Place::KernelInfoGetAttributeFloat, "softcap")};
        return nullptr;
    };
    return made;
}

}  // namespace operators
