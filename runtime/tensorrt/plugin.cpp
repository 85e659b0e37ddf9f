// Attention to a latent cache as TensorRT plugins, with kernels that were compiled ahead of time and lie in this file.
//
// TensorRT is known by its headers alone and CUDA by its driver, which is looked up when it is first needed, so that
// g++ builds this with neither library. Nothing is allocated, loaded or waited for when an engine runs: a step is
// launches on TensorRT's stream, which a CUDA graph can capture.
//
// Axes: B sequences, S new tokens, H query heads, T rows that a cache has room for, n rope groups, d rope channels,
// r rank, R numbers of a row [latent | rope keys | key scales | value scales].

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

using namespace nvinfer1;

namespace
{
// ---- what the generated tables hold

struct Kernel
{
    unsigned char const* cubin;
    char const* name;
    int32_t threads;
    int32_t sharedBytes;
};

// Attention of a block of so many rows to tiles of so many keys. A row is a (query token, head).
struct Tiles
{
    int32_t rows;
    int32_t keys;
    Kernel partial; // writes float32 results of several splits
    Kernel direct;  // writes the result itself, of the only split
};

constexpr int32_t kMOST_TACTICS = 8;

struct DecodeKernels
{
    int32_t architecture;
    DataType type;
    int32_t rank, groups, ropeDim, keyScales, valueScales, heads;
    bool scaledRope, windowed, capped, slopes, sinks, chunked;
    int32_t nbTactics;
    Tiles tactics[kMOST_TACTICS]; // for one new token; TensorRT takes the fastest
    Tiles several; // for any number of them
};

struct CombineKernel
{
    int32_t architecture;
    DataType type;
    int32_t rank;
    bool sinks;
    int32_t splits; // at most
    int32_t columns;
    Kernel kernel;
};

struct AppendKernel
{
    int32_t architecture;
    DataType type;
    int32_t rank, groups, ropeDim, scales;
    Kernel kernel;
};

#include "kernels.inc"

// ---- what TensorRT and the user are told

std::atomic<ILoggerFinder*> gLoggerFinder{nullptr};

void report(std::string const& message)
{
    ILoggerFinder* const finder = gLoggerFinder;
    ILogger* const logger = finder ? finder->findLogger() : nullptr;
    if (logger)
        logger->log(ILogger::Severity::kERROR, message.c_str());
    else
        std::fprintf(stderr, "%s\n", message.c_str());
}

std::string capability(int32_t architecture)
{
    return std::to_string(architecture / 10) + "." + std::to_string(architecture % 10);
}

// ---- the CUDA driver, of which only this much is needed

struct Driver
{
    int (*cuCtxGetCurrent)(void** context);
    int (*cuCtxGetDevice)(int* device);
    int (*cuDeviceGetAttribute)(int* value, int attribute, int device);
    int (*cuModuleLoadData)(void** module, void const* image);
    int (*cuModuleUnload)(void* module);
    int (*cuModuleGetFunction)(void** function, void* module, char const* name);
    int (*cuFuncSetAttribute)(void* function, int attribute, int value);
    int (*cuLaunchKernel)(void* function, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX,
        unsigned blockY, unsigned blockZ, unsigned sharedBytes, void* stream, void** arguments, void** extra);
    int (*cuMemcpyDtoDAsync_v2)(unsigned long long to, unsigned long long from, size_t bytes, void* stream);
    bool found{true};

    static Driver const& get()
    {
        static Driver const driver;
        return driver;
    }

private:
    Driver()
    {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW);
        find(library, cuCtxGetCurrent, "cuCtxGetCurrent");
        find(library, cuCtxGetDevice, "cuCtxGetDevice");
        find(library, cuDeviceGetAttribute, "cuDeviceGetAttribute");
        find(library, cuModuleLoadData, "cuModuleLoadData");
        find(library, cuModuleUnload, "cuModuleUnload");
        find(library, cuModuleGetFunction, "cuModuleGetFunction");
        find(library, cuFuncSetAttribute, "cuFuncSetAttribute");
        find(library, cuLaunchKernel, "cuLaunchKernel");
        find(library, cuMemcpyDtoDAsync_v2, "cuMemcpyDtoDAsync_v2");
        if (!found)
            report("mla_compile: libcuda.so.1 was not found or is too old. Install NVIDIA's driver.");
    }

    template <class Function>
    void find(void* library, Function& function, char const* name)
    {
        function = library ? reinterpret_cast<Function>(dlsym(library, name)) : nullptr;
        found = found && function;
    }
};

bool succeeded(int error, char const* call)
{
    if (error)
        report(std::string("mla_compile: ") + call + " failed with CUDA error " + std::to_string(error) + ".");
    return error == 0;
}

struct Device
{
    int32_t architecture{0};
    int32_t processors{0};

    // The device of the calling thread; architecture 0 if there is none.
    static Device current()
    {
        constexpr int kPROCESSORS = 16, kMAJOR = 75, kMINOR = 76;
        Driver const& driver = Driver::get();
        int device{}, major{}, minor{}, processors{};
        if (!driver.found || !succeeded(driver.cuCtxGetDevice(&device), "cuCtxGetDevice")
            || !succeeded(driver.cuDeviceGetAttribute(&major, kMAJOR, device), "cuDeviceGetAttribute")
            || !succeeded(driver.cuDeviceGetAttribute(&minor, kMINOR, device), "cuDeviceGetAttribute")
            || !succeeded(driver.cuDeviceGetAttribute(&processors, kPROCESSORS, device), "cuDeviceGetAttribute"))
            return {};
        return {10 * major + minor, processors};
    }
};

// A kernel in the memory of a device. All layers that launch it share it.
class Loaded
{
public:
    static std::shared_ptr<Loaded const> get(Kernel const& kernel)
    {
        // Both outlive every plugin, whatever the order in which a process tears down.
        static auto* const mutex = new std::mutex;
        static auto* const all = new std::map<std::pair<void*, void const*>, std::weak_ptr<Loaded const>>;
        void* context{};
        if (!succeeded(Driver::get().cuCtxGetCurrent(&context), "cuCtxGetCurrent"))
            return nullptr;
        std::lock_guard<std::mutex> const lock(*mutex);
        auto& known = (*all)[{context, kernel.cubin}];
        auto loaded = known.lock();
        if (!loaded)
            known = loaded = load(kernel);
        return loaded;
    }

    ~Loaded()
    {
        Driver::get().cuModuleUnload(mModule); // its context may be gone already, and the module with it
    }

    Loaded(Loaded const&) = delete;
    Loaded& operator=(Loaded const&) = delete;

    // Arguments are addresses of the kernel's own, but for null, which stands for one that the kernel does not have.
    // Behind them Triton has two pointers to scratch memory, which is not used.
    template <size_t count>
    bool launch(std::array<int64_t, 3> grid, cudaStream_t stream, void const* const (&values)[count]) const
    {
        void* scratch = nullptr;
        void* arguments[count + 2];
        size_t used = 0;
        for (void const* const value : values)
            if (value)
                arguments[used++] = const_cast<void*>(value);
        arguments[used++] = &scratch;
        arguments[used++] = &scratch;
        auto const [x, y, z] = grid;
        int const error = Driver::get().cuLaunchKernel(mFunction, static_cast<unsigned>(x), static_cast<unsigned>(y),
            static_cast<unsigned>(z), static_cast<unsigned>(mThreads), 1, 1, static_cast<unsigned>(mSharedBytes),
            stream, arguments, nullptr);
        return succeeded(error, "cuLaunchKernel");
    }

private:
    Loaded(void* module, Kernel const& kernel)
        : mModule(module)
        , mThreads(kernel.threads)
        , mSharedBytes(kernel.sharedBytes)
    {
    }

    static std::shared_ptr<Loaded const> load(Kernel const& kernel)
    {
        constexpr int kMAX_DYNAMIC_SHARED = 8;
        constexpr int32_t kALWAYS_ALLOWED = 48 * 1024;
        Driver const& driver = Driver::get();
        void* module{};
        if (!succeeded(driver.cuModuleLoadData(&module, kernel.cubin), "cuModuleLoadData"))
            return nullptr;
        std::shared_ptr<Loaded> loaded(new Loaded(module, kernel));
        void*& function = loaded->mFunction;
        if (!succeeded(driver.cuModuleGetFunction(&function, module, kernel.name), "cuModuleGetFunction"))
            return nullptr;
        if (kernel.sharedBytes > kALWAYS_ALLOWED
            && !succeeded(driver.cuFuncSetAttribute(function, kMAX_DYNAMIC_SHARED, kernel.sharedBytes),
                "cuFuncSetAttribute"))
            return nullptr;
        return loaded;
    }

    void* mModule;
    void* mFunction{};
    int32_t mThreads;
    int32_t mSharedBytes;
};

// ---- arithmetic

int64_t ceilDiv(int64_t number, int64_t divisor)
{
    return (number + divisor - 1) / divisor;
}

// choose_splits of mla_compile.runtime.kernels.schedule.
int64_t chooseSplits(int64_t batch, int64_t blocks, int64_t rows, int64_t tokens, int64_t processors)
{
    int64_t const least = kTOKENS_PER_ROW * rows;
    int64_t const most = std::max<int64_t>(1, std::min(tokens / least, processors));
    int64_t best = 1, shortest = std::numeric_limits<int64_t>::max();
    for (int64_t splits = 1; splits <= most; ++splits)
    {
        int64_t const turns = ceilDiv(batch * blocks * splits, processors);
        int64_t const time = turns * (ceilDiv(tokens, splits) + (splits > 1 ? least / 4 : 0));
        if (time < shortest)
        {
            shortest = time;
            best = splits;
        }
    }
    return best;
}

size_t itemSize(DataType type)
{
    return type == DataType::kFLOAT ? 4 : 2;
}

char const* nameOf(DataType type)
{
    return type == DataType::kFLOAT ? "float32" : type == DataType::kHALF ? "float16" : "bfloat16";
}

bool isAligned(void const* pointer)
{
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// ---- what all plugins have in common

struct Attribute
{
    char const* name;
    PluginFieldType type;  // kINT32 or kFLOAT32
    std::uint32_t bits{0}; // of the value

    template <class Value>
    Value as() const
    {
        static_assert(sizeof(Value) == sizeof(bits));
        Value value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
};

class Plugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuildV2, public IPluginV3OneRuntime
{
public:
    Plugin(char const* name, std::vector<Attribute> attributes)
        : mAttributes(std::move(attributes))
        , mName(name)
    {
    }

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuildV2*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    AsciiChar const* getPluginName() const noexcept override
    {
        return mName;
    }

    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kVERSION;
    }

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kNAMESPACE;
    }

    int32_t getNbOutputs() const noexcept override
    {
        return 1;
    }

    // Times of other kernels, or of a node with other attributes, say nothing of this one.
    char const* getTimingCacheID() noexcept override
    {
        mTimingCacheId = kBUILD_ID;
        for (Attribute const& attribute : mAttributes)
            mTimingCacheId += "_" + std::to_string(attribute.bits);
        return mTimingCacheId.c_str();
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*,
        int32_t) noexcept override
    {
        std::vector<PluginTensorDesc> inputs;
        for (int32_t i = 0; i < nbInputs; ++i)
            inputs.push_back(in[i].desc);
        return findKernels(inputs.data()) ? 0 : 1;
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override
    {
        return clone();
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        mFields.clear();
        for (Attribute const& attribute : mAttributes)
            mFields.emplace_back(attribute.name, &attribute.bits, attribute.type, 1);
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
        return &mCollection;
    }

protected:
    // Looks for kernels of this thread's device that take these inputs, of which some extents may be unknown (-1).
    virtual bool findKernels(PluginTensorDesc const* in) noexcept = 0;

    // The entry of a generated table that a predicate accepts.
    template <class Entry, size_t count, class Predicate>
    static Entry const* lookUp(Entry const (&table)[count], int32_t architecture, Predicate accepts)
    {
        auto const found = std::find_if(table, table + count,
            [&](Entry const& entry) { return entry.architecture == architecture && accepts(entry); });
        return found == table + count ? nullptr : found;
    }

    bool refuse(Device const& device, std::string const& what) const
    {
        if (device.architecture)
            report(std::string("mla_compile: the plugin library has no ") + getPluginName() + " kernel for " + what
                + " on compute capability " + capability(device.architecture)
                + ". Build it again with 'mla-compile build-plugin', from this ONNX file and for this GPU.");
        return false;
    }

    std::vector<Attribute> mAttributes;

private:
    char const* mName;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
    std::string mTimingCacheId;
};

template <class Node>
class Creator final : public IPluginCreatorV3One
{
public:
    explicit Creator(char const* name)
        : mName(name)
    {
        for (Attribute const& attribute : Node::attributes())
            mFields.emplace_back(attribute.name, nullptr, attribute.type, 1);
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    }

    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override
    {
        std::vector<Attribute> attributes = Node::attributes();
        for (Attribute& attribute : attributes)
        {
            auto const end = given->fields + given->nbFields;
            auto const field = std::find_if(given->fields, end,
                [&](PluginField const& x) { return !std::strcmp(x.name, attribute.name) && x.type == attribute.type; });
            if (field == end || !field->data || field->length < 1)
            {
                report(std::string("mla_compile: ") + mName + " has no attribute '" + attribute.name
                    + "'. Write the ONNX file again with this version of mla-compile.");
                return nullptr;
            }
            std::memcpy(&attribute.bits, field->data, sizeof attribute.bits);
        }
        return new Node(mName, std::move(attributes));
    }

    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mCollection;
    }

    AsciiChar const* getPluginName() const noexcept override
    {
        return mName;
    }

    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kVERSION;
    }

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kNAMESPACE;
    }

private:
    char const* mName;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

// ---- LatentAppend: row [B, S, R], cos and sin [B, S, n, d/2], cache [B, 1, T, R], lengths [B] -> the cache

class LatentAppend final : public Plugin
{
public:
    using Plugin::Plugin;

    static std::vector<Attribute> attributes()
    {
        return {{"latent_rank", PluginFieldType::kINT32}};
    }

    IPluginV3* clone() noexcept override
    {
        return new LatentAppend(*this);
    }

    int32_t getOutputDataTypes(DataType* out, int32_t, DataType const* in, int32_t) const noexcept override
    {
        out[0] = in[kCACHE];
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* in, int32_t, DimsExprs const*, int32_t, DimsExprs* out, int32_t,
        IExprBuilder&) noexcept override
    {
        out[0] = in[kCACHE];
        return 0;
    }

    // Honoured with the preview feature kALIASED_PLUGIN_IO_10_03; without it enqueue() copies.
    int32_t getAliasedInput(int32_t) noexcept override
    {
        return kCACHE;
    }

    bool supportsFormatCombination(
        int32_t position, DynamicPluginTensorDesc const* tensors, int32_t, int32_t) noexcept override
    {
        DataType const type = tensors[position].desc.type;
        if (tensors[position].desc.format != TensorFormat::kLINEAR)
            return false;
        switch (position)
        {
        case kROW:
            return std::any_of(std::begin(kAPPEND_KERNELS), std::end(kAPPEND_KERNELS),
                [=](AppendKernel const& x) { return x.type == type; });
        case kCOS:
        case kSIN: return type == DataType::kFLOAT;
        case kLENGTHS: return type == DataType::kINT32;
        default: return type == tensors[kROW].desc.type;
        }
    }

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) noexcept override
    {
        if (!findKernels(in))
            return 1;
        mLoaded = Loaded::get(mKernel->kernel);
        return mLoaded ? 0 : 1;
    }

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void*, cudaStream_t stream) noexcept override
    {
        int64_t const batch = in[kROW].dims.d[0], tokens = in[kROW].dims.d[1];
        int64_t const room = in[kCACHE].dims.d[2], width = in[kCACHE].dims.d[3];
        if (!std::all_of(inputs, inputs + kNB_INPUTS, isAligned) || !isAligned(outputs[0]))
        {
            report("mla_compile: a tensor of LatentAppend is not aligned to 16 bytes.");
            return 1;
        }
        if (inputs[kCACHE] != outputs[0]
            && !succeeded(Driver::get().cuMemcpyDtoDAsync_v2(reinterpret_cast<uintptr_t>(outputs[0]),
                              reinterpret_cast<uintptr_t>(inputs[kCACHE]),
                              static_cast<size_t>(batch * room * width) * itemSize(in[kCACHE].type), stream),
                "cuMemcpyDtoDAsync"))
            return 1;
        if (batch * tokens == 0)
            return 0;
        auto const roomArgument = static_cast<int32_t>(room), newArgument = static_cast<int32_t>(tokens);
        bool const launched = mLoaded->launch({tokens, batch, 1}, stream,
            {&inputs[kROW], &inputs[kCOS], &inputs[kSIN], &inputs[kCACHE], &inputs[kLENGTHS], &roomArgument,
                &newArgument, &outputs[0]});
        return launched ? 0 : 1;
    }

protected:
    bool findKernels(PluginTensorDesc const* in) noexcept override
    {
        auto const rank = mAttributes[0].as<int32_t>();
        int64_t const groups = in[kCOS].dims.d[2], ropeDim = 2 * in[kCOS].dims.d[3];
        int64_t const scales = in[kROW].dims.d[2] - rank - groups * ropeDim;
        Device const device = Device::current();
        mKernel = lookUp(kAPPEND_KERNELS, device.architecture, [&](AppendKernel const& x) {
            return x.type == in[kROW].type && x.rank == rank && x.groups == groups && x.ropeDim == ropeDim
                && x.scales == scales;
        });
        return mKernel
            || refuse(device,
                std::string(nameOf(in[kROW].type)) + " rows of rank " + std::to_string(rank) + " and "
                    + std::to_string(groups) + " rope keys of " + std::to_string(ropeDim) + " and "
                    + std::to_string(scales) + " scales");
    }

private:
    enum Input : int32_t
    {
        kROW,
        kCOS,
        kSIN,
        kCACHE,
        kLENGTHS,
        kNB_INPUTS
    };

    AppendKernel const* mKernel{};
    std::shared_ptr<Loaded const> mLoaded;
};

// ---- LatentAttentionDecode: queries [B, S, H, r] and [B, S, H, d], rows [B, 1, T, R], lengths [B], and where its name
// says so slopes [H] and sinks [H] -> contexts [B, S, H, r]

class LatentAttentionDecode final : public Plugin
{
public:
    using Plugin::Plugin;

    static std::vector<Attribute> attributes()
    {
        PluginFieldType const integer = PluginFieldType::kINT32, real = PluginFieldType::kFLOAT32;
        return {{"rope_groups", integer}, {"scale", real}, {"softcap", real}, {"window", integer},
            {"chunked", integer}, {"key_scales", integer}, {"value_scales", integer}, {"scaled_rope", integer},
            {"has_slopes", integer}, {"has_sinks", integer}};
    }

    IPluginV3* clone() noexcept override
    {
        return new LatentAttentionDecode(*this);
    }

    int32_t getOutputDataTypes(DataType* out, int32_t, DataType const* in, int32_t) const noexcept override
    {
        out[0] = in[kQ_LATENT];
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* in, int32_t, DimsExprs const*, int32_t, DimsExprs* out, int32_t,
        IExprBuilder&) noexcept override
    {
        out[0] = in[kQ_LATENT];
        return 0;
    }

    bool supportsFormatCombination(
        int32_t position, DynamicPluginTensorDesc const* tensors, int32_t nbInputs, int32_t) noexcept override
    {
        DataType const type = tensors[position].desc.type;
        if (tensors[position].desc.format != TensorFormat::kLINEAR)
            return false;
        if (position == kQ_LATENT)
            return std::any_of(std::begin(kDECODE_KERNELS), std::end(kDECODE_KERNELS),
                [=](DecodeKernels const& x) { return x.type == type; });
        if (position == kLENGTHS)
            return type == DataType::kINT32;
        bool const isPerHead = position > kLENGTHS && position < nbInputs;
        return type == (isPerHead ? DataType::kFLOAT : tensors[kQ_LATENT].desc.type);
    }

    // A split has at least kTOKENS_PER_ROW tokens per row of a block's queries, so that a sequence's rows times its
    // splits are T / kTOKENS_PER_ROW at most, however the keys are cut; one split writes denominators only.
    size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
        int32_t) const noexcept override
    {
        Dims const& queries = in[kQ_LATENT].max;
        int64_t const parts = in[kROWS].max.d[2] / kTOKENS_PER_ROW * (queries.d[3] + 1);
        int64_t const denominators = queries.d[1] * queries.d[2];
        return static_cast<size_t>(queries.d[0] * std::max(parts, denominators)) * sizeof(float) + kALIGNMENT;
    }

    int32_t getNbTactics() noexcept override
    {
        return mKernels ? mKernels->nbTactics : 0;
    }

    int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override
    {
        for (int32_t i = 0; i < count; ++i)
            tactics[i] = i + 1; // 0 is TensorRT's own
        return 0;
    }

    int32_t setTactic(int32_t tactic) noexcept override
    {
        mTactic = tactic;
        return mKernels && mBatch >= 0 && !prepare() ? 1 : 0;
    }

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) noexcept override
    {
        mBatch = in[kQ_LATENT].dims.d[0];
        mTokens = in[kQ_LATENT].dims.d[1];
        mRoom = in[kROWS].dims.d[2];
        return findKernels(in) && prepare() ? 0 : 1;
    }

    int32_t enqueue(PluginTensorDesc const*, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
        void* workspace, cudaStream_t stream) noexcept override
    {
        bool const hasSlopes = mKernels->slopes, hasSinks = mKernels->sinks;
        void const* const* const slopes = hasSlopes ? inputs + kLENGTHS + 1 : nullptr;
        void const* const* const sinks = hasSinks ? inputs + kLENGTHS + 1 + hasSlopes : nullptr;
        if (!std::all_of(inputs, inputs + kLENGTHS + 1 + hasSlopes + hasSinks, isAligned) || !isAligned(outputs[0])
            || !isAligned(workspace))
        {
            report("mla_compile: a tensor of LatentAttentionDecode is not aligned to 16 bytes.");
            return 1;
        }
        int64_t const rows = mTokens * mKernels->heads, rank = mKernels->rank;
        if (mBatch * rows == 0)
            return 0;
        size_t const partsBytes = mSplits > 1 ? static_cast<size_t>(mBatch * rows * mSplits * rank) * sizeof(float) : 0;
        void* const parts = mSplits > 1 ? workspace : outputs[0];
        void* const denominators
            = static_cast<char*>(workspace) + (partsBytes + kALIGNMENT - 1) / kALIGNMENT * kALIGNMENT;
        auto const scale = mAttributes[kSCALE].as<float>(), softcap = mAttributes[kSOFTCAP].as<float>();
        auto const window = mAttributes[kWINDOW].as<int32_t>();
        auto const room = static_cast<int32_t>(mRoom), tokens = static_cast<int32_t>(mTokens);
        auto const splits = static_cast<int32_t>(mSplits);
        auto const leastTiles = static_cast<int32_t>(ceilDiv(kTOKENS_PER_ROW * rows, mTiles->keys));
        bool const attended = mAttend->launch({ceilDiv(rows, mTiles->rows), mSplits, mBatch}, stream,
            {&inputs[kQ_LATENT], &inputs[kQ_ROPE], &inputs[kROWS], &inputs[kLENGTHS], slopes, &parts, &denominators,
                mSplits > 1 ? nullptr : sinks, &scale, &softcap, &room, &tokens, &mKernels->heads, &window, &splits,
                &leastTiles});
        if (!attended || mSplits == 1)
            return attended ? 0 : 1;
        bool const combined = mCombine->launch({mBatch * rows, ceilDiv(rank, mCombineColumns), 1}, stream,
            {&parts, &denominators, sinks, &outputs[0], &mKernels->heads, &splits});
        return combined ? 0 : 1;
    }

protected:
    bool findKernels(PluginTensorDesc const* in) noexcept override
    {
        Dims const& queries = in[kQ_LATENT].dims;
        int64_t const heads = queries.d[2], rank = queries.d[3], ropeDim = in[kQ_ROPE].dims.d[3];
        auto const groups = mAttributes[kGROUPS].as<int32_t>();
        auto const keyScales = mAttributes[kKEY_SCALES].as<int32_t>();
        auto const valueScales = mAttributes[kVALUE_SCALES].as<int32_t>();
        bool const scaledRope = mAttributes[kSCALED_ROPE].as<int32_t>() > 0;
        bool const windowed = mAttributes[kWINDOW].as<int32_t>() > 0;
        bool const chunked = mAttributes[kCHUNKED].as<int32_t>() > 0;
        bool const capped = mAttributes[kSOFTCAP].as<float>() > 0;
        bool const slopes = mAttributes[kHAS_SLOPES].as<int32_t>() > 0;
        bool const sinks = mAttributes[kHAS_SINKS].as<int32_t>() > 0;
        mDevice = Device::current();
        mKernels = lookUp(kDECODE_KERNELS, mDevice.architecture, [&](DecodeKernels const& x) {
            return x.type == in[kQ_LATENT].type && x.rank == rank && x.groups == groups && x.ropeDim == ropeDim
                && x.keyScales == keyScales && x.valueScales == valueScales && x.heads == heads
                && x.scaledRope == scaledRope && x.windowed == windowed && x.capped == capped && x.slopes == slopes
                && x.sinks == sinks && x.chunked == chunked;
        });
        return mKernels
            || refuse(mDevice,
                std::string(nameOf(in[kQ_LATENT].type)) + " queries of " + std::to_string(heads) + " heads, rank "
                    + std::to_string(rank) + ", " + std::to_string(groups) + " rope keys of " + std::to_string(ropeDim)
                    + ", " + std::to_string(keyScales) + " key and " + std::to_string(valueScales) + " value scales"
                    + (chunked ? " in chunks" : windowed ? " in a window" : ""));
    }

private:
    enum Input : int32_t
    {
        kQ_LATENT,
        kQ_ROPE,
        kROWS,
        kLENGTHS
    };

    enum AttributeIndex : int32_t
    {
        kGROUPS,
        kSCALE,
        kSOFTCAP,
        kWINDOW,
        kCHUNKED,
        kKEY_SCALES,
        kVALUE_SCALES,
        kSCALED_ROPE,
        kHAS_SLOPES,
        kHAS_SINKS
    };

    static constexpr size_t kALIGNMENT = 16;

    // Cuts the keys and loads what will be launched, for the shapes and the tactic as they are now.
    bool prepare()
    {
        bool const known = mTactic >= 1 && mTactic <= mKernels->nbTactics;
        mTiles = mTokens > 1 ? &mKernels->several : mKernels->tactics + (known ? mTactic - 1 : 0);
        int64_t const rows = mTokens * mKernels->heads;
        int64_t const processors = std::min(mDevice.processors, kMOST_SPLITS);
        mSplits = rows ? chooseSplits(mBatch, ceilDiv(rows, mTiles->rows), rows, mRoom, processors) : 1;
        mAttend = Loaded::get(mSplits > 1 ? mTiles->partial : mTiles->direct);
        if (!mAttend || mSplits == 1)
            return mAttend != nullptr;
        // The table is sorted: the first that holds so many is the smallest.
        auto const* const combine = lookUp(kCOMBINE_KERNELS, mDevice.architecture, [&](CombineKernel const& x) {
            return x.type == mKernels->type && x.rank == mKernels->rank && x.sinks == mKernels->sinks
                && x.splits >= mSplits;
        });
        mCombineColumns = combine->columns;
        mCombine = Loaded::get(combine->kernel);
        return mCombine != nullptr;
    }

    int32_t mTactic{0};
    int64_t mBatch{-1}, mTokens{-1}, mRoom{-1};
    Device mDevice;
    DecodeKernels const* mKernels{};
    Tiles const* mTiles{};
    int64_t mSplits{1};
    int64_t mCombineColumns{1};
    std::shared_ptr<Loaded const> mAttend;
    std::shared_ptr<Loaded const> mCombine;
};

// One for every name, as a node's name says what inputs it has.
std::vector<IPluginCreatorInterface*> const& creators()
{
    // Never deleted: a registry may outlive what is static here.
    static auto const* const all = [] {
        auto* const made = new std::vector<IPluginCreatorInterface*>{new Creator<LatentAppend>("LatentAppend")};
        for (char const* const name : kDECODE_NAMES)
            made->push_back(new Creator<LatentAttentionDecode>(name));
        return made;
    }();
    return *all;
}

#ifdef MLA_SELF_REGISTERING
// ONNX Runtime's provider only opens a library, which then has to register its plugins itself. TensorRT is in the
// process already, though not where the linker would look for it.
struct Registration
{
    Registration()
    {
#define MLA_TEXT(x) #x
#define MLA_LIBRARY(name, major) name ".so." MLA_TEXT(major)
        void* found = dlsym(RTLD_DEFAULT, "getPluginRegistry");
        constexpr char const* kLIBRARIES[]
            = {MLA_LIBRARY("libnvinfer", NV_TENSORRT_MAJOR), MLA_LIBRARY("libnvinfer_lean", NV_TENSORRT_MAJOR)};
        for (char const* const name : kLIBRARIES)
            if (void* const library = found ? nullptr : dlopen(name, RTLD_NOW | RTLD_NOLOAD))
                found = dlsym(library, "getPluginRegistry");
#undef MLA_LIBRARY
#undef MLA_TEXT
        if (!found)
        {
            report("mla_compile: no TensorRT " + std::to_string(NV_TENSORRT_MAJOR)
                + ", for which this plugin library was built, is loaded. Build it with the headers of yours.");
            return;
        }
        IPluginRegistry* const registry = reinterpret_cast<IPluginRegistry* (*) ()>(found)();
        for (IPluginCreatorInterface* const creator : creators())
            registry->registerCreator(*creator, kNAMESPACE);
    }
};

Registration const gRegistration;
#endif
} // namespace

#define MLA_EXPORTED extern "C" __attribute__((visibility("default")))

// Called by IPluginRegistry::loadLibrary().
MLA_EXPORTED IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    count = static_cast<int32_t>(creators().size());
    return creators().data();
}

MLA_EXPORTED void setLoggerFinder(ILoggerFinder* finder)
{
    gLoggerFinder = finder;
}
