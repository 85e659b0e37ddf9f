// What an operator is called with: its node's attributes, inputs and outputs, and the session's threads.
#pragma once

#include <atomic>
#include <new>
#include <string>
#include <vector>

#include "abi.h"

namespace ort {

// A node's attribute, or nothing: zero.
template <typename T>
T attribute(Table table, const KernelInfo* info, Place place, const char* name) {
    T found{};
    auto* status = call<Status*>(table, place, info, name, &found);
    if (status) call<void>(table, Place::ReleaseStatus, status);
    return status ? T{} : found;
}

struct Failure {
    Status* status;
};

struct Call {
    Table table;
    Context* context;

    void check(Status* status) const {
        if (status) throw Failure{status};
    }

    [[noreturn]] void refuse(const std::string& why) const {
        constexpr int invalid_argument = 2;
        throw Failure{ort::call<Status*>(table, Place::CreateStatus, invalid_argument, why.c_str())};
    }

    Value* input(size_t index) const {
        const Value* value;
        check(ort::call<Status*>(table, Place::KernelContextGetInput, static_cast<const Context*>(context), index, &value));
        return const_cast<Value*>(value);
    }

    // Null: the node does not have it.
    const float* optional(size_t index) const {
        Value* value = input(index);
        return value ? data<float>(value) : nullptr;
    }

    std::vector<int64_t> shape(size_t index) const {
        return described<std::vector<int64_t>>(index, [&](const TensorInfo* info) {
            size_t rank;
            check(ort::call<Status*>(table, Place::GetDimensionsCount, info, &rank));
            std::vector<int64_t> sizes(rank);
            check(ort::call<Status*>(table, Place::GetDimensions, info, sizes.data(), rank));
            return sizes;
        });
    }

    // Of an input that has so many axes.
    std::vector<int64_t> shape(size_t index, const char* name, size_t rank) const {
        auto sizes = shape(index);
        if (sizes.size() != rank) refuse_sizes(name);
        return sizes;
    }

    Element element(size_t index) const {
        return described<Element>(index, [&](const TensorInfo* info) {
            Element found;
            check(ort::call<Status*>(table, Place::GetTensorElementType, info, &found));
            return found;
        });
    }

    // ONNX Runtime lets sizes that are told at run time be anything, and what does not fit would be read past its end.
    void require(size_t index, const char* name, const std::vector<int64_t>& sizes) const {
        if (shape(index) != sizes) refuse_sizes(name);
    }

    [[noreturn]] void refuse_sizes(const char* name) const {
        refuse(std::string("attention: the sizes of ") + name +
               " do not fit the others: are all inputs of equally many sequences and tokens?");
    }

    template <typename T>
    T* data(Value* value) const {
        void* found;
        check(ort::call<Status*>(table, Place::GetTensorMutableData, value, &found));
        return static_cast<T*>(found);
    }

    template <typename T>
    T* output(size_t index, const std::vector<int64_t>& sizes) const {
        Value* value;
        check(ort::call<Status*>(table, Place::KernelContextGetOutput, context, index, sizes.data(), sizes.size(),
                                 &value));
        if (!value) refuse("attention: an output is missing");
        return data<T>(value);
    }

    // Read an input's description.
    template <typename Result, typename Read>
    Result described(size_t index, Read read) const {
        TensorInfo* info;
        check(ort::call<Status*>(table, Place::GetTensorTypeAndShape, static_cast<const Value*>(input(index)), &info));
        const Result found = read(info);
        ort::call<void>(table, Place::ReleaseTensorTypeAndShapeInfo, info);
        return found;
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
        check(ort::call<Status*>(table, Place::KernelContextParallelFor, static_cast<const Context*>(context), function,
                                 count, size_t{0}, static_cast<void*>(&guarded)));
        if (failed) throw std::bad_alloc();
    }
};

// A node's computation, as ONNX Runtime calls it: `Body(call, kernel)`. No exception may reach it.
template <typename Kernel, auto Body>
Status* compute(void* made, Context* context) {
    const Kernel& kernel = *static_cast<Kernel*>(made);
    const Call call{kernel.table, context};
    try {
        Body(call, kernel);
        return nullptr;
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const std::bad_alloc&) {
        return ort::call<Status*>(call.table, Place::CreateStatus, 1, "there is no memory for attention");
    }
}

// An operator of the processor's, of which its name, its inputs and outputs, and its attributes are to be told yet. All its
// outputs are there.
template <typename Kernel, auto Body>
Operator operator_of() {
    Operator made{};
    made.version = kVersion;
    made.provider = [](const Operator*) -> const char* { return "CPUExecutionProvider"; };
    made.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    made.compute_checked = compute<Kernel, Body>;
    made.output_kind = [](const Operator*, size_t) { return kRequired; };
    made.input_memory = [](const Operator*, size_t) { return 0; };
    made.variadic_input_minimum = [](const Operator*) { return 0; };
    made.variadic_input_alike = [](const Operator*) { return 0; };
    made.variadic_output_minimum = [](const Operator*) { return 0; };
    made.variadic_output_alike = [](const Operator*) { return 0; };
    made.first_version = [](const Operator*) { return 1; };
    made.last_version = [](const Operator*) { return 1; };
    return made;
}

}  // namespace ort
