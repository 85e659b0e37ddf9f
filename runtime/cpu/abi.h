// The parts of ONNX Runtime's C interface that the operators use, so that building them needs no headers of its own.
//
// The interface is a table of functions, to which releases only ever append: a function's place, counted from zero, is
// the same in every release from the one that brought it. A library asks for the table by a version, and ONNX Runtime
// refuses versions it does not know. Version 17 (ONNX Runtime 1.17) is the oldest with all that is used here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kVersion = 17;

// What is behind these is ONNX Runtime's own.
struct Status;
struct SessionOptions;
struct Domain;
struct KernelInfo;
struct Context;
struct Value;
struct TensorInfo;

enum class Place {
    CreateStatus = 0,
    CreateCustomOpDomain = 26,
    CustomOpDomainAdd = 27,
    AddCustomOpDomain = 28,
    GetTensorMutableData = 51,
    GetTensorElementType = 60,
    GetDimensionsCount = 61,
    GetDimensions = 62,
    GetTensorTypeAndShape = 65,
    KernelInfoGetAttributeFloat = 85,
    KernelInfoGetAttributeInt64 = 86,
    KernelContextGetInput = 90,
    KernelContextGetOutput = 91,
    ReleaseStatus = 93,
    ReleaseTensorTypeAndShapeInfo = 99,
    KernelContextParallelFor = 274,
};

using Table = void* const*;

struct ApiBase {
    Table (*table)(uint32_t version);
    const char* (*version)();
};

template <typename Result, typename... Arguments>
Result call(Table table, Place place, Arguments... arguments) {
    using Function = Result (*)(Arguments...);
    return reinterpret_cast<Function>(table[static_cast<int>(place)])(arguments...);
}

enum class Element : int { Any = 0, Float = 1, UInt8 = 2, Int8 = 3, Int64 = 7, Bool = 9, Float16 = 10 };

constexpr int kRequired = 0, kOptional = 1;  // of inputs and outputs

// What ONNX Runtime asks about an operator. It reads no further than the version says.
struct Operator {
    uint32_t version;
    void* (*create)(const Operator*, Table, const KernelInfo*);
    const char* (*name)(const Operator*);
    const char* (*provider)(const Operator*);
    Element (*input_type)(const Operator*, size_t);
    size_t (*input_count)(const Operator*);
    Element (*output_type)(const Operator*, size_t);
    size_t (*output_count)(const Operator*);
    void (*compute)(void*, Context*);
    void (*destroy)(void*);
    int (*input_kind)(const Operator*, size_t);
    int (*output_kind)(const Operator*, size_t);
    int (*input_memory)(const Operator*, size_t);
    int (*variadic_input_minimum)(const Operator*);
    int (*variadic_input_alike)(const Operator*);
    int (*variadic_output_minimum)(const Operator*);
    int (*variadic_output_alike)(const Operator*);
    Status* (*create_checked)(const Operator*, Table, const KernelInfo*, void**);
    Status* (*compute_checked)(void*, Context*);
    Status* (*infer_shapes)(const Operator*, void*);
    int (*first_version)(const Operator*);
    int (*last_version)(const Operator*);
};

}  // namespace ort
