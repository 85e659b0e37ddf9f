// Drives a plugin's whole life as TensorRT would, without TensorRT, and prints what it answers as lines of JSON.
//
//     harness LIBRARY < scenarios
//
// A scenario is a line, the node's name and "TYPE B S T H r d n SCALE WINDOW TACTIC ALIGNED" to attend, or
// "TYPE B S T r n d INPLACE ALIGNED" to append; TYPE is a number of nvinfer1::DataType. Inputs lie at 4096, 8192 and so
// on, the output at 1 << 20, the workspace at 1 << 21; the stream is 7.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace
{
constexpr size_t kOUTPUT = 1 << 20, kWORKSPACE = 1 << 21, kSTREAM = 7;

struct Log final : ILogger, ILoggerFinder
{
    void log(Severity severity, AsciiChar const* message) noexcept override
    {
        auto const number = static_cast<int32_t>(severity);
        std::printf("{\"event\": \"log\", \"severity\": %d, \"message\": \"%s\"}\n", number, message);
    }

    ILogger* findLogger() override
    {
        return this;
    }
};

struct Scenario
{
    std::string name;
    std::vector<PluginTensorDesc> inputs;
    PluginTensorDesc output;
    std::vector<PluginField> fields;
    int32_t tactic{0};
    bool inPlace{false};
    bool aligned{true};
};

PluginTensorDesc tensor(DataType type, std::vector<int64_t> extents)
{
    PluginTensorDesc made{};
    made.dims.nbDims = static_cast<int32_t>(extents.size());
    std::copy(extents.begin(), extents.end(), made.dims.d);
    made.type = type;
    return made;
}

// Numbers that fields point to, for as long as a scenario lasts.
struct Values
{
    int32_t rank, groups, window, chunked, slopes, sinks, none;
    float scale, softcap;
};

Scenario read(std::istringstream& line, Values& values)
{
    Scenario made;
    int32_t type{};
    int64_t batch{}, tokens{}, room{}, heads{}, ropeDim{};
    line >> made.name >> type >> batch >> tokens >> room;
    auto const number = static_cast<DataType>(type);
    if (made.name != "LatentAppend")
    {
        line >> heads >> values.rank >> ropeDim >> values.groups >> values.scale >> values.window >> made.tactic
            >> made.aligned;
        int64_t const width = values.rank + values.groups * ropeDim;
        made.inputs = {tensor(number, {batch, tokens, heads, values.rank}),
            tensor(number, {batch, tokens, heads, ropeDim}), tensor(number, {batch, 1, room, width}),
            tensor(DataType::kINT32, {batch})};
        values.slopes = made.name.find("_slopes") != std::string::npos;
        values.sinks = made.name.find("_sinks") != std::string::npos;
        values.chunked = made.name.find("_chunked") != std::string::npos;
        for (int32_t i = 0; i < values.slopes + values.sinks; ++i)
            made.inputs.push_back(tensor(DataType::kFLOAT, {heads}));
        made.output = made.inputs[0];
        made.fields = {{"window", &values.window, PluginFieldType::kINT32, 1},
            {"chunked", &values.chunked, PluginFieldType::kINT32, 1},
            {"rope_groups", &values.groups, PluginFieldType::kINT32, 1},
            {"has_slopes", &values.slopes, PluginFieldType::kINT32, 1},
            {"has_sinks", &values.sinks, PluginFieldType::kINT32, 1},
            {"scale", &values.scale, PluginFieldType::kFLOAT32, 1},
            {"softcap", &values.softcap, PluginFieldType::kFLOAT32, 1}};
        for (char const* name : {"key_scales", "value_scales", "scaled_rope"})
            made.fields.emplace_back(name, &values.none, PluginFieldType::kINT32, 1);
    }
    else
    {
        line >> values.rank >> values.groups >> ropeDim >> made.inPlace >> made.aligned;
        int64_t const width = values.rank + values.groups * ropeDim;
        auto const turns = tensor(DataType::kFLOAT, {batch, tokens, values.groups, ropeDim / 2});
        made.inputs = {tensor(number, {batch, tokens, width}), turns, turns, tensor(number, {batch, 1, room, width}),
            tensor(DataType::kINT32, {batch})};
        made.output = made.inputs[3];
        made.fields = {{"latent_rank", &values.rank, PluginFieldType::kINT32, 1}};
    }
    return made;
}

template <class Capability>
Capability& capability(IPluginV3& plugin, PluginCapabilityType type)
{
    return *static_cast<Capability*>(plugin.getCapabilityInterface(type));
}

void printFields(PluginFieldCollection const& fields)
{
    std::printf("{\"event\": \"fields\"");
    for (int32_t i = 0; i < fields.nbFields; ++i)
    {
        PluginField const& field = fields.fields[i];
        if (field.type == PluginFieldType::kINT32)
            std::printf(", \"%s\": %d", field.name, *static_cast<int32_t const*>(field.data));
        else
            std::printf(", \"%s\": %.9g", field.name, static_cast<double>(*static_cast<float const*>(field.data)));
    }
    std::printf("}\n");
}

void printShape(IPluginV3OneBuildV2& build, Scenario const& scenario)
{
    // Expressions are pointers, of which a plugin only hands on some: input i's axis j is 10 * i + j + 1 here.
    std::vector<DimsExprs> inputs;
    for (size_t i = 0; i < scenario.inputs.size(); ++i)
    {
        DimsExprs made{scenario.inputs[i].dims.nbDims, {}};
        for (int32_t j = 0; j < made.nbDims; ++j)
            made.d[j] = reinterpret_cast<IDimensionExpr const*>(10 * i + static_cast<size_t>(j) + 1);
        inputs.push_back(made);
    }
    DimsExprs output{};
    int64_t nobody{};
    build.getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0, &output, 1,
        reinterpret_cast<IExprBuilder&>(nobody));
    std::printf("{\"event\": \"shape\", \"axes\": [");
    for (int32_t j = 0; j < output.nbDims; ++j)
        std::printf("%s%zu", j ? ", " : "", reinterpret_cast<size_t>(output.d[j]));
    std::printf("]}\n");
}

// Which types and formats are taken at every place, if those before it have what they shall have.
void printFormats(IPluginV3OneBuildV2& build, std::vector<DynamicPluginTensorDesc> tensors)
{
    auto const count = static_cast<int32_t>(tensors.size());
    std::printf("{\"event\": \"formats\", \"types\": [");
    for (int32_t place = 0; place < count; ++place)
    {
        PluginTensorDesc& shown = tensors[static_cast<size_t>(place)].desc;
        PluginTensorDesc const proper = shown;
        std::printf("%s[", place ? ", " : "");
        char const* separator = "";
        for (DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kINT32, DataType::kBF16})
        {
            shown.type = type;
            if (build.supportsFormatCombination(place, tensors.data(), count - 1, 1))
            {
                std::printf("%s%d", separator, static_cast<int32_t>(type));
                separator = ", ";
            }
        }
        shown = proper;
        shown.format = TensorFormat::kCHW2;
        if (build.supportsFormatCombination(place, tensors.data(), count - 1, 1))
            std::printf("%s-1", separator);
        shown = proper;
        std::printf("]");
    }
    std::printf("]}\n");
}

// Questions that are asked while an engine is built; whether the plugin could be configured.
bool ask(IPluginV3& plugin, Scenario const& scenario)
{
    auto& build = capability<IPluginV3OneBuildV2>(plugin, PluginCapabilityType::kBUILD);
    std::vector<DynamicPluginTensorDesc> tensors;
    for (PluginTensorDesc const& input : scenario.inputs)
        tensors.push_back({input, input.dims, input.dims, input.dims});
    tensors.push_back({scenario.output, scenario.output.dims, scenario.output.dims, scenario.output.dims});
    auto const count = static_cast<int32_t>(scenario.inputs.size());

    std::vector<DataType> types;
    for (PluginTensorDesc const& input : scenario.inputs)
        types.push_back(input.type);
    DataType type{};
    build.getOutputDataTypes(&type, 1, types.data(), count);
    std::printf("{\"event\": \"build\", \"outputs\": %d, \"type\": %d, \"aliased\": %d, \"cache_id\": \"%s\"}\n",
        build.getNbOutputs(), static_cast<int32_t>(type), build.getAliasedInput(0), build.getTimingCacheID());
    printShape(build, scenario);
    printFormats(build, tensors);

    // Extents that an engine does not know yet are -1.
    std::vector<DynamicPluginTensorDesc> unknown = tensors;
    for (DynamicPluginTensorDesc& made : unknown)
        made.desc.dims.d[0] = -1;
    if (build.configurePlugin(unknown.data(), count, unknown.data() + count, 1))
        return false;
    std::vector<int32_t> tactics(static_cast<size_t>(build.getNbTactics()));
    build.getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size()));
    std::printf("{\"event\": \"configured\", \"workspace\": %zu, \"tactics\": [",
        build.getWorkspaceSize(tensors.data(), count, tensors.data() + count, 1));
    for (size_t i = 0; i < tactics.size(); ++i)
        std::printf("%s%d", i ? ", " : "", tactics[i]);
    std::printf("]}\n");
    return true;
}

bool execute(IPluginV3& plugin, Scenario const& scenario)
{
    auto& runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    auto const count = static_cast<int32_t>(scenario.inputs.size());
    if (scenario.tactic && runtime.setTactic(scenario.tactic))
        return false;
    if (runtime.onShapeChange(scenario.inputs.data(), count, &scenario.output, 1))
        return false;
    std::printf("{\"event\": \"enqueue\"}\n"); // from here on only launches and copies may follow
    std::vector<void const*> inputs;
    for (size_t i = 0; i < scenario.inputs.size(); ++i)
        inputs.push_back(reinterpret_cast<void const*>(4096 * (i + 1) + (scenario.aligned ? 0 : 4)));
    void* output = scenario.inPlace ? const_cast<void*>(inputs[3]) : reinterpret_cast<void*>(kOUTPUT);
    return !runtime.enqueue(scenario.inputs.data(), &scenario.output, inputs.data(), &output,
        reinterpret_cast<void*>(kWORKSPACE), reinterpret_cast<cudaStream_t>(kSTREAM));
}
} // namespace

int main(int, char** arguments)
{
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    void* const library = dlopen(arguments[1], RTLD_NOW);
    if (!library)
    {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    using GetCreators = IPluginCreatorInterface* const* (*) (int32_t&);
    int32_t count{};
    auto const* const creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(count);
    Log log;
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&log);

    std::vector<std::unique_ptr<IPluginV3>> alive; // contexts of one engine, until it ends
    for (std::string text; std::getline(std::cin, text);)
    {
        std::istringstream line(text);
        Values values{};
        Scenario const scenario = read(line, values);
        for (int32_t i = 0; i < count; ++i)
        {
            auto& creator = static_cast<IPluginCreatorV3One&>(*creators[i]);
            if (creator.getPluginName() != scenario.name)
                continue;
            std::printf("{\"event\": \"creator\", \"kind\": \"%s\", \"version\": \"%s\", \"namespace\": \"%s\", "
                        "\"attributes\": %d}\n",
                creator.getInterfaceInfo().kind, creator.getPluginVersion(), creator.getPluginNamespace(),
                creator.getFieldNames()->nbFields);
            PluginFieldCollection const given{static_cast<int32_t>(scenario.fields.size()), scenario.fields.data()};
            std::unique_ptr<IPluginV3> const first(creator.createPlugin("first", &given, TensorRTPhase::kBUILD));
            std::unique_ptr<IPluginV3> const built(first->clone());
            bool done = ask(*built, scenario);
            if (done)
            {
                auto& runtime = capability<IPluginV3OneRuntime>(*built, PluginCapabilityType::kRUNTIME);
                PluginFieldCollection const& stored = *runtime.getFieldsToSerialize();
                printFields(stored);
                std::unique_ptr<IPluginV3> const read(creator.createPlugin("read", &stored, TensorRTPhase::kRUNTIME));
                auto& attaching = capability<IPluginV3OneRuntime>(*read, PluginCapabilityType::kRUNTIME);
                alive.emplace_back(attaching.attachToContext(nullptr));
                done = execute(*alive.back(), scenario);
            }
            std::printf("{\"event\": \"end\", \"done\": %s}\n", done ? "true" : "false");
        }
    }
    alive.clear();
    return 0;
}
