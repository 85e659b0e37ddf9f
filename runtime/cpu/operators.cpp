// ONNX Runtime operators of the domain `mla_compile.cpu`, as a library for `RegisterCustomOpsLibrary`.

#include <mutex>

#include "attention.h"
#include "prepare_operators.h"

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                              const ort::ApiBase* base) {
    using namespace operators;
    static const ort::Operator all[] = {folded_attention<Numbers>(), folded_attention<Halves>(),
                                        folded_attention<Codes>(), folded_attention<Pairs>(),
                                        prepare_attention<Numbers>(), prepare_attention<Halves>(),
                                        prepare_attention<Codes>(), prepare_attention<Pairs>()};
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
        for (const ort::Operator& one : all)
            if (auto* status = ort::call<ort::Status*>(table, ort::Place::CustomOpDomainAdd, made, &one)) return status;
        domain = made;  // lives as long as the library
    }
    return ort::call<ort::Status*>(table, ort::Place::AddCustomOpDomain, options, domain);
}
