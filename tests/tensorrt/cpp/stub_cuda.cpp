// A stand-in for libcuda.so.1 that does nothing and prints every call, as a line of JSON.
//
// STUB_ARCHITECTURE and STUB_PROCESSORS say what the device is, STUB_PARAMETERS what parameters kernels have by digests
// of their machine code, such as "123=ppi 456=pif": p a pointer, i a 32-bit integer, f a float. STUB_FAILING names a
// call that fails.

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#define API extern "C" __attribute__((visibility("default")))

namespace
{
char const* setting(char const* name)
{
    char const* const value = std::getenv(name);
    return value ? value : "";
}

int result(char const* call)
{
    return std::strcmp(setting("STUB_FAILING"), call) ? 0 : 999;
}

// End of a table of an ELF file: where it begins, and the size and number of its entries, stand at these places.
size_t endOfTable(unsigned char const* image, size_t begin, size_t entry)
{
    uint64_t offset{};
    uint16_t size{}, count{};
    std::memcpy(&offset, image + begin, sizeof offset);
    std::memcpy(&size, image + entry, sizeof size);
    std::memcpy(&count, image + entry + sizeof size, sizeof count);
    return offset + size * count;
}

// Bytes of an ELF file in memory: it ends with one of its two tables.
size_t sizeOfElf(unsigned char const* image)
{
    return std::max(endOfTable(image, 32, 54), endOfTable(image, 40, 58));
}

// FNV-1a.
uint64_t digest(unsigned char const* bytes, size_t size)
{
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < size; ++i)
        hash = (hash ^ bytes[i]) * 0x100000001b3;
    return hash;
}

struct Module
{
    uint64_t digest;
    std::string name;
};

std::string parametersOf(uint64_t kernel)
{
    std::string const all = " " + std::string(setting("STUB_PARAMETERS")) + " ";
    std::string const key = " " + std::to_string(kernel) + "=";
    size_t const found = all.find(key);
    if (found == std::string::npos)
        return "";
    size_t const begin = found + key.size();
    return all.substr(begin, all.find(' ', begin) - begin);
}
} // namespace

API int cuCtxGetCurrent(void** context)
{
    *context = reinterpret_cast<void*>(1);
    return result("cuCtxGetCurrent");
}

API int cuCtxGetDevice(int* device)
{
    *device = 0;
    return result("cuCtxGetDevice");
}

API int cuDeviceGetAttribute(int* value, int attribute, int)
{
    int const architecture = std::atoi(setting("STUB_ARCHITECTURE"));
    *value = attribute == 75 ? architecture / 10
        : attribute == 76    ? architecture % 10
        : attribute == 16    ? std::atoi(setting("STUB_PROCESSORS"))
                             : -1;
    return result("cuDeviceGetAttribute");
}

API int cuModuleLoadData(void** module, void const* image)
{
    auto const* const bytes = static_cast<unsigned char const*>(image);
    uint64_t const found = digest(bytes, sizeOfElf(bytes));
    *module = new Module{found, ""};
    std::printf("{\"event\": \"load\", \"digest\": %" PRIu64 "}\n", found);
    return result("cuModuleLoadData");
}

API int cuModuleUnload(void* module)
{
    delete static_cast<Module*>(module);
    std::printf("{\"event\": \"unload\"}\n");
    return 0;
}

API int cuModuleGetFunction(void** function, void* module, char const* name)
{
    static_cast<Module*>(module)->name = name;
    *function = module;
    return result("cuModuleGetFunction");
}

API int cuFuncSetAttribute(void*, int attribute, int value)
{
    std::printf("{\"event\": \"allow\", \"attribute\": %d, \"value\": %d}\n", attribute, value);
    return result("cuFuncSetAttribute");
}

API int cuLaunchKernel(void* function, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX,
    unsigned blockY, unsigned blockZ, unsigned sharedBytes, void* stream, void** arguments, void**)
{
    auto const& module = *static_cast<Module*>(function);
    std::printf("{\"event\": \"launch\", \"name\": \"%s\", \"digest\": %" PRIu64
                ", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %zu, \"arguments\": [",
        module.name.c_str(), module.digest, gridX, gridY, gridZ, blockX, blockY, blockZ,
        sharedBytes, reinterpret_cast<size_t>(stream));
    std::string const parameters = parametersOf(module.digest);
    for (size_t i = 0; i < parameters.size(); ++i)
    {
        char const* const separator = i ? ", " : "";
        if (parameters[i] == 'p')
            std::printf("%s%zu", separator, *static_cast<size_t*>(arguments[i]));
        else if (parameters[i] == 'i')
            std::printf("%s%" PRId32, separator, *static_cast<int32_t*>(arguments[i]));
        else
            std::printf("%s%.9g", separator, static_cast<double>(*static_cast<float*>(arguments[i])));
    }
    std::printf("]}\n");
    return result("cuLaunchKernel");
}

API int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, void* stream)
{
    std::printf("{\"event\": \"copy\", \"to\": %llu, \"from\": %llu, \"bytes\": %zu, \"stream\": %zu}\n", to, from,
        bytes, reinterpret_cast<size_t>(stream));
    return result("cuMemcpyDtoDAsync_v2");
}
