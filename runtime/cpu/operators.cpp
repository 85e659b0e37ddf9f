// ONNX Runtime operators of the domain `mla_compile.cpu`, as a library for `RegisterCustomOpsLibrary`.
//
// FoldedAttention: plain queries [B, S, H, D], turned queries [B, S, n, h, d], rows [B, T, R], which of them each
// query sees [B, S, T] (bool), key up-projections [G, D, r], value up-projections [G', r, V]; output [B, S, H, V].
// FoldedAttentionOfHalves: the same with rows in float16. All else is float32 there too.
// FoldedAttentionOfCodes: the same with codes (uint8) for rows, and behind these inputs their scales [B, T, 2 + m + w].
// FoldedAttentionOfPairs: the same with rows in two halves [B, 1, T, W], of which the second stand behind these inputs;
// behind a row's own numbers a pair of halves may have others.
// Optional inputs of all, behind those or nothing in their place: sinks [H]; slopes [H], and with them distances of
// tokens from queries [B, S, T]. Optional attributes: softcap; how many key_scales (m) and value_scales (w) a row ends in,
// or stand behind the scales of its codes; and scaled_rope.

#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include "abi.h"
#include "folded_codes.h"

namespace {

// Memory that steps use over and over: getting megabytes anew from the system costs more than what is computed there.
class Pool {
  public:
    std::vector<float> take(size_t count) {
        std::vector<float> found;
        {
            std::lock_guard<std::mutex> guard(lock_);
            auto best = free_.end();
            for (auto it = free_.begin(); it != free_.end(); ++it)
                if (best == free_.end() || fits_better(it->size(), best->size(), count)) best = it;
            if (best != free_.end()) {
                found = std::move(*best);
                free_.erase(best);
            }
        }
        if (found.size() < count) {
            found.clear();  // or what it holds would be copied
            found.resize(count);
        }
        return found;
    }

    void give(std::vector<float> memory) {
        std::lock_guard<std::mutex> guard(lock_);
        free_.push_back(std::move(memory));
    }

  private:
    // The smallest that is large enough, else the largest: what a long prompt took does not become the size of all.
    static bool fits_better(size_t one, size_t other, size_t count) {
        if ((one >= count) != (other >= count)) return one >= count;
        return one >= count ? one < other : one > other;
    }

    std::mutex lock_;
    std::vector<std::vector<float>> free_;
};

Pool pool;

class Borrowed {
  public:
    explicit Borrowed(size_t count) : memory_(pool.take(count)) {}
    ~Borrowed() { pool.give(std::move(memory_)); }
    float* data() { return memory_.data(); }

  private:
    std::vector<float> memory_;
};

struct Kernel {
    ort::Table table;
    int64_t key_scales, value_scales, scaled_rope;
    float softcap;
};

// A node's attribute, or nothing: zero.
template <typename T>
T attribute(ort::Table table, const ort::KernelInfo* info, ort::Place place, const char* name) {
    T found{};
    auto* status = ort::call<ort::Status*>(table, place, info, name, &found);
    if (status) ort::call<void>(table, ort::Place::ReleaseStatus, status);
    return status ? T{} : found;
}

struct Failure {
    ort::Status* status;
};

struct Call {
    ort::Table table;
    ort::Context* context;

    void check(ort::Status* status) const {
        if (status) throw Failure{status};
    }

    [[noreturn]] void refuse(const std::string& why) const {
        constexpr int invalid_argument = 2;
        throw Failure{ort::call<ort::Status*>(table, ort::Place::CreateStatus, invalid_argument, why.c_str())};
    }

    ort::Value* input(size_t index) const {
        const ort::Value* value;
        check(ort::call<ort::Status*>(table, ort::Place::KernelContextGetInput,
                                      static_cast<const ort::Context*>(context), index, &value));
        return const_cast<ort::Value*>(value);
    }

    // Null: the node does not have it.
    const float* optional(size_t index) const {
        ort::Value* value = input(index);
        return value ? data<float>(value) : nullptr;
    }

    std::vector<int64_t> shape(size_t index) const {
        ort::TensorInfo* info;
        check(ort::call<ort::Status*>(table, ort::Place::GetTensorTypeAndShape,
                                      static_cast<const ort::Value*>(input(index)), &info));
        const ort::TensorInfo* read = info;
        size_t rank;
        check(ort::call<ort::Status*>(table, ort::Place::GetDimensionsCount, read, &rank));
        std::vector<int64_t> sizes(rank);
        check(ort::call<ort::Status*>(table, ort::Place::GetDimensions, read, sizes.data(), rank));
        ort::call<void>(table, ort::Place::ReleaseTensorTypeAndShapeInfo, info);
        return sizes;
    }

    template <typename T>
    T* data(ort::Value* value) const {
        void* found;
        check(ort::call<ort::Status*>(table, ort::Place::GetTensorMutableData, value, &found));
        return static_cast<T*>(found);
    }

    float* output(const std::vector<int64_t>& sizes) const {
        ort::Value* value;
        check(ort::call<ort::Status*>(table, ort::Place::KernelContextGetOutput, context, size_t{0}, sizes.data(),
                                      sizes.size(), &value));
        return data<float>(value);
    }

    // Run tasks by the session's threads. No exception may leave one: between them and us are functions in C.
    template <typename Task>
    void each(size_t count, Task task) const {
        std::atomic<bool> failed{false};
        auto guarded = [&](long index) {
            try {
                task(index);
            } catch (...) {
                failed = true;
            }
        };
        auto run = [](void* given, size_t index) {
            (*static_cast<decltype(guarded)*>(given))(static_cast<long>(index));
        };
        void (*function)(void*, size_t) = run;
        check(ort::call<ort::Status*>(table, ort::Place::KernelContextParallelFor,
                                      static_cast<const ort::Context*>(context), function, count, size_t{0},
                                      static_cast<void*>(&guarded)));
        if (failed) throw std::bad_alloc();
    }
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
enum Input : size_t { Plain, Turned, Rows, Seen, KeyUp, ValueUp, Beside, Sinks, Slopes, Distance, Inputs };

constexpr const char* names[] = {"queries", "turned queries", "rows", "mask", "key up-projections",
                                 "value up-projections", "scales or second halves", "sinks", "slopes", "distances"};

// ONNX Runtime lets sizes that are told at run time be anything, and what does not fit would be read past its end.
void require(const Call& call, Input input, const std::vector<int64_t>& sizes) {
    if (call.shape(input) != sizes) call.refuse(std::string("attention: the sizes of ") + names[input] +
                                                " do not fit the others: are all inputs of equally many sequences and tokens?");
}

// How far the numbers of one sequence are from those of the next; one sequence's are all others' too.
long of_each(const Call& call, Input input, const mla::Sizes& s) {
    const bool shared = call.shape(input)[0] == 1;
    require(call, input, {shared ? 1 : s.batch, s.queries, s.tokens});
    return shared ? 0 : s.queries * s.tokens;
}

// Whether all inputs are as large as s says, which is read from five of them, with W of the halves of rows.
template <typename Form>
void require_sizes(const Call& call, const mla::Sizes& s, long width, bool sinks, bool slopes) {
    require(call, Turned, {s.batch, s.queries, s.rope_groups, s.heads / std::max(1L, s.rope_groups), s.rope});
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

template <typename Form>
void attention(const Call& call, const Kernel& kernel) {
    const auto plain = call.shape(Plain), turned = call.shape(Turned), rows = call.shape(Rows),
               key_up = call.shape(KeyUp), value_up = call.shape(ValueUp);
    const int64_t tokens = rows[rows.size() - 2], width = rows.back();
    const int64_t row = key_up[2] + turned[2] * turned[4] + kernel.key_scales + kernel.value_scales;
    const mla::Sizes s{plain[0],  plain[1],  plain[2], tokens,    row,         key_up[2],
                       turned[4], turned[2], plain[3], key_up[0], value_up[0], value_up[2],
                       kernel.key_scales, kernel.value_scales, kernel.scaled_rope != 0};
    const auto *plain_data = call.data<float>(call.input(Plain)), *turned_data = call.data<float>(call.input(Turned)),
               *key_data = call.data<float>(call.input(KeyUp)), *value_data = call.data<float>(call.input(ValueUp));
    const bool* seen_data = call.data<bool>(call.input(Seen));
    const float *sinks = call.optional(Sinks), *slopes = call.optional(Slopes), *distance = call.optional(Distance);
    const auto* rows_data = call.data<typename Form::Row>(call.input(Rows));
    require_sizes<Form>(call, s, width, sinks, slopes);
    const long seen_each = of_each(call, Seen, s), distance_each = slopes ? of_each(call, Distance, s) : 0;
    float* output = call.output({s.batch, s.queries, s.heads, s.value});

    const long query_size = quantised<Form> ? mla::code_query(s) : s.query();
    Borrowed memory(s.batch * (query_size + s.splits() * s.partial()));
    float *queries = memory.data(), *partials = queries + s.batch * query_size;
    // A group's weights are read for one sequence after another.
    call.each(s.batch * s.key_groups, [&](long task) {
        const long b = task % s.batch, group = task / s.batch;
        Borrowed scratch(s.heads / s.key_groups * s.rank);
        mla::fold_queries(s, b, group, plain_data, key_data, scratch.data(), queries + b * query_size);
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
            Borrowed scratch(mla::attend_codes_scratch(s));
            mla::attend_codes(s, split, own_rows, scales, logits, query, partial, scratch.data());
        } else if constexpr (paired<Form>) {
            const float* second = call.data<float>(call.input(Beside)) + b * s.tokens * width;
            Borrowed scratch(mla::attend_scratch(s));
            mla::attend_pairs(s, split, own_rows, second, width, logits, query, partial, scratch.data());
        } else if constexpr (std::is_same_v<Form, Halves>) {
            Borrowed scratch(mla::attend_copies_scratch(s));
            mla::attend_halves(s, split, own_rows, logits, query, partial, scratch.data());
        } else {
            Borrowed scratch(mla::attend_scratch(s));
            mla::attend(s, split, own_rows, logits, query, partial, scratch.data());
        }
    });
    call.each(s.batch * s.value_groups, [&](long task) {
        const long b = task % s.batch, group = task / s.batch;
        Borrowed scratch(s.heads / s.value_groups * s.rank);
        mla::unfold_output(s, b, group, partials + b * s.splits() * s.partial(), value_data, sinks, scratch.data(),
                           output);
    });
}

template <typename Form>
ort::Status* compute(void* made, ort::Context* context) {
    const Kernel& kernel = *static_cast<Kernel*>(made);
    const Call call{kernel.table, context};
    try {
        attention<Form>(call, kernel);
        return nullptr;
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const std::bad_alloc&) {
        return ort::call<ort::Status*>(call.table, ort::Place::CreateStatus, 1, "there is no memory for attention");
    }
}

template <typename Form>
ort::Operator folded_attention() {
    ort::Operator made{};
    made.version = ort::kVersion;
    made.name = [](const ort::Operator*) { return Form::name; };
    made.provider = [](const ort::Operator*) -> const char* { return "CPUExecutionProvider"; };
    made.input_type = [](const ort::Operator*, size_t index) {
        if (index == Seen) return ort::Element::Bool;
        return index == Rows ? Form::element : ort::Element::Float;
    };
    made.input_count = [](const ort::Operator*) { return size_t{Inputs}; };
    made.output_type = [](const ort::Operator*, size_t) { return ort::Element::Float; };
    made.output_count = [](const ort::Operator*) { return size_t{1}; };
    made.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    made.input_kind = [](const ort::Operator*, size_t index) {
        constexpr int required = 0, optional = 1;
        return index < (quantised<Form> || paired<Form> ? Sinks : Beside) ? required : optional;
    };
    made.output_kind = [](const ort::Operator*, size_t) { return 0; };
    made.input_memory = [](const ort::Operator*, size_t) { return 0; };
    made.variadic_input_minimum = [](const ort::Operator*) { return 0; };
    made.variadic_input_alike = [](const ort::Operator*) { return 0; };
    made.variadic_output_minimum = [](const ort::Operator*) { return 0; };
    made.variadic_output_alike = [](const ort::Operator*) { return 0; };
    made.create_checked = [](const ort::Operator*, ort::Table table, const ort::KernelInfo* info,
                             void** kernel) -> ort::Status* {
        const auto count = [&](const char* name) {
            return attribute<int64_t>(table, info, ort::Place::KernelInfoGetAttributeInt64, name);
        };
        *kernel = new Kernel{table, count("key_scales"), count("value_scales"), count("scaled_rope"),
                             attribute<float>(table, info, ort::Place::KernelInfoGetAttributeFloat, "softcap")};
        return nullptr;
    };
    made.compute_checked = compute<Form>;
    made.first_version = [](const ort::Operator*) { return 1; };
    made.last_version = [](const ort::Operator*) { return 1; };
    return made;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                              const ort::ApiBase* base) {
    static const ort::Operator operators[] = {folded_attention<Numbers>(), folded_attention<Halves>(),
                                              folded_attention<Codes>(), folded_attention<Pairs>()};
    const ort::Table table = base->table(ort::kVersion);
    if (!table)
        return ort::call<ort::Status*>(base->table(1), ort::Place::CreateStatus, 1,
                                       "the library of mla-compile needs ONNX Runtime 1.17 or later");
    static ort::Domain* domain = nullptr;
    static std::mutex lock;
    std::lock_guard<std::mutex> guard(lock);
    if (!domain) {
        ort::Domain* made;
        if (auto* status = ort::call<ort::Status*>(table, ort::Place::CreateCustomOpDomain, "mla_compile.cpu", &made))
            return status;
        for (const ort::Operator& one : operators)
            if (auto* status = ort::call<ort::Status*>(table, ort::Place::CustomOpDomainAdd, made, &one)) return status;
        domain = made;  // lives as long as the library
    }
    return ort::call<ort::Status*>(table, ort::Place::AddCustomOpDomain, options, domain);
}
