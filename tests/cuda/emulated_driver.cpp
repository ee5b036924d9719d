// The CUDA driver on a CPU, as far as driver.py calls it: it takes the machine code that NVRTC makes for a GPU, refuses
// what a driver refuses, and runs the emulated kernel of the same name on the parameters that the GPU's would read.
//
// Types and numbers are those of cuda.h, alike in CUDA 12.4, 12.9 and 13.0.
#include <dlfcn.h>
#include <elf.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;

// What cuda.h names CUDA_ERROR_*, and others.
enum CUresult : int {
  SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209,
  INVALID_HANDLE = 400, NOT_FOUND = 500, LAUNCH_OUT_OF_RESOURCES = 701, LAUNCH_FAILED = 719, NOT_SUPPORTED = 801
};
enum CUlaunchAttributeID { CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6 };
enum CUfunction_attribute {
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT = 9
};

union CUlaunchAttributeValue {
  char pad[64];
  int programmaticStreamSerializationAllowed;
};
struct CUlaunchAttribute {
  CUlaunchAttributeID id;
  char pad[8 - sizeof(CUlaunchAttributeID)];
  CUlaunchAttributeValue value;
};
struct CUlaunchConfig {
  unsigned int gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
  struct CUstream_st* hStream;
  CUlaunchAttribute* attrs;
  unsigned int numAttrs;
};

struct CUfunc_st {
  struct Parameter { u16 offset, bytes; };
  std::map<u16, Parameter> parameters;  // by ordinal
  u32 max_threads = 1024, max_shared_bytes = 48 << 10;
  int carveout = -1;  // no preference
  bool entry = false;
  void* library = nullptr;  // of the emulated kernel
  std::string name;
};
struct CUmod_st { std::map<std::string, CUfunc_st> functions; };
typedef std::function<const char*()> Operation;  // of the device; returns what is wrong, or null
typedef CUmod_st* CUmodule;
typedef CUfunc_st* CUfunction;

static std::vector<std::unique_ptr<CUmod_st>> modules;
static std::set<CUfunction> found;
static u64 seed = 0;

static CUresult run_at_once(CUstream_st*, const std::string& kernel, const Operation& launch) {
  const char* fault = launch();
  if (fault) std::fprintf(stderr, "%s: %s\n", kernel.c_str(), fault);
  return fault ? LAUNCH_FAILED : SUCCESS;
}

// -- for the tests: the machine, and what it was asked for ----------------------------------------------------------

extern "C" {
int architecture = 86, version = 13000;  // compute capability 8.6, CUDA 13.0
int failure = SUCCESS;                   // what the next call returns, once
void* library = nullptr;                 // emulator.py's build of the .cu file whose machine code is loaded next
// CUlaunchConfig's numbers; the attribute's id and value, 0 without one; the kernel's shared-memory carveout
u64 launched[12];
int max_shared_bytes[8], max_shared_calls = 0;  // of cuFuncSetAttribute

// What else emulated_gpu/runtime.cpp sets: who runs a launch, who finds the build, and what a kernel may access.
CUresult (*submit)(CUstream_st* stream, const std::string& kernel, const Operation& launch) = run_at_once;
void* (*find_library)(const char* image) = [](const char*) { return library; };
std::map<u64, u64> tensors;  // first byte → end; none: all of memory
bool (*has_context)() = [] { return true; };  // whether a context is current on the calling thread

// The bytes of each parameter of a kernel in the module that was loaded last; returns how many it has.
int parameter_bytes(const char* kernel, int* bytes) {
  const auto& parameters = modules.back()->functions.at(kernel).parameters;
  for (const auto& [ordinal, parameter] : parameters) bytes[ordinal] = parameter.bytes;
  return (int)parameters.size();
}
}

static int max_opt_in() {  // CUDA C++ programming guide, "Technical Specifications per Compute Capability"
  return (architecture == 80 ? 163 : architecture < 90 ? 99 : 227) << 10;
}

#define NEEDS_CONTEXT if (!has_context()) return INVALID_CONTEXT;
#define MAY_FAIL if (failure) { const int now = failure; failure = SUCCESS; return (CUresult)now; }

// -- cubins: ELF, of which NVIDIA documents little; names as cuobjdump and readelf print them -------------------------

constexpr int STO_CUDA_ENTRY = 0x10, EIFMT_SVAL = 4, EIATTR_MAX_THREADS = 5, EIATTR_KPARAM_INFO = 0x17;

template <class T> static T at(const char* from) { T x; std::memcpy(&x, from, sizeof x); return x; }

static void read_info(CUfunc_st& function, const char* info, const char* end) {
  while (info < end) {
    const bool sized = info[0] == EIFMT_SVAL;  // else the two bytes are the value
    const char* value = info + 4;
    if (info[1] == EIATTR_KPARAM_INFO)
      function.parameters[at<u16>(value + 4)] = {at<u16>(value + 6), (u16)(at<u32>(value + 8) >> 18)};
    if (info[1] == EIATTR_MAX_THREADS) function.max_threads = at<u32>(value) * at<u32>(value + 4) * at<u32>(value + 8);
    info = value + (sized ? at<u16>(info + 2) : 0);
  }
}

static CUresult read(CUmod_st& module, const char* image) {
  if (std::memcmp(image, ELFMAG, SELFMAG)) return INVALID_IMAGE;
  const auto header = at<Elf64_Ehdr>(image);
  if (header.e_machine != EM_CUDA) return INVALID_IMAGE;
  const int target = header.e_flags >> (header.e_ident[EI_ABIVERSION] < 8 ? 0 : 8) & 0xff;  // 8: from CUDA 13 on
  if (target / 10 != architecture / 10 || target > architecture) return NO_BINARY_FOR_GPU;
  std::vector<Elf64_Shdr> sections(header.e_shnum);
  std::memcpy(sections.data(), image + header.e_shoff, header.e_shnum * sizeof(Elf64_Shdr));
  for (const Elf64_Shdr& section : sections) {
    const char *begin = image + section.sh_offset, *end = begin + section.sh_size;
    const std::string name = image + sections[header.e_shstrndx].sh_offset + section.sh_name, info = ".nv.info.";
    if (name.compare(0, info.size(), info) == 0) read_info(module.functions[name.substr(info.size())], begin, end);
    if (section.sh_type != SHT_SYMTAB) continue;
    for (const char* place = begin; place < end; place += sizeof(Elf64_Sym)) {
      const auto symbol = at<Elf64_Sym>(place);
      if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || !(symbol.st_other & STO_CUDA_ENTRY)) continue;
      module.functions[image + sections[section.sh_link].sh_offset + symbol.st_name].entry = true;
    }
  }
  return SUCCESS;
}

// -- the driver -------------------------------------------------------------------------------------------------------

extern "C" CUresult cuDriverGetVersion(int* driver_version) {
  MAY_FAIL
  *driver_version = version;
  return SUCCESS;
}

extern "C" CUresult cuGetErrorString(CUresult error, const char** text) {
  static const std::map<int, const char*> texts = {
      {SUCCESS, "no error"}, {INVALID_VALUE, "invalid argument"}, {INVALID_IMAGE, "device kernel image is invalid"},
      {INVALID_CONTEXT, "invalid device context"},
      {NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"},
      {INVALID_HANDLE, "invalid resource handle"}, {NOT_FOUND, "named symbol not found"},
      {LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"},
      {LAUNCH_FAILED, "unspecified launch failure"}, {NOT_SUPPORTED, "operation not supported"}};
  const auto known = texts.find(error);
  *text = known == texts.end() ? nullptr : known->second;
  return *text ? SUCCESS : INVALID_VALUE;
}

extern "C" CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  NEEDS_CONTEXT
  MAY_FAIL
  std::unique_ptr<CUmod_st> made(new CUmod_st);
  if (const CUresult result = read(*made, (const char*)image)) return result;
  void* const build = find_library((const char*)image);
  for (auto& [name, function] : made->functions) function.name = name, function.library = build;
  *module = made.get();
  modules.push_back(std::move(made));
  return SUCCESS;
}

extern "C" CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  NEEDS_CONTEXT
  MAY_FAIL
  bool known = false;
  for (const auto& loaded : modules) known |= loaded.get() == module;
  if (!known) return INVALID_HANDLE;
  const auto named = module->functions.find(name);
  if (named == module->functions.end() || !named->second.entry) return NOT_FOUND;
  found.insert(*function = &named->second);
  return SUCCESS;
}

extern "C" CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  NEEDS_CONTEXT
  MAY_FAIL
  if (!found.count(function)) return INVALID_HANDLE;
  if (which == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT) {
    if (value < -1 || value > 100) return INVALID_VALUE;  // percent, -1: none
    function->carveout = value;
    return SUCCESS;
  }
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return INVALID_VALUE;
  if (value < 0 || value > max_opt_in()) return INVALID_VALUE;
  max_shared_bytes[max_shared_calls++ % 8] = function->max_shared_bytes = value;
  return SUCCESS;
}

extern "C" CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                                     void** extra) {
  NEEDS_CONTEXT
  MAY_FAIL
  if (!found.count(function)) return INVALID_HANDLE;
  const CUlaunchConfig& c = *config;
  const u64 threads = (u64)c.blockDimX * c.blockDimY * c.blockDimZ;
  if (!c.gridDimX || !c.gridDimY || !c.gridDimZ || !threads || extra) return INVALID_VALUE;
  if (c.gridDimX > 0x7fffffff || c.gridDimY > 0xffff || c.gridDimZ > 0xffff || threads > 1024) return INVALID_VALUE;
  if (c.sharedMemBytes > function->max_shared_bytes) return INVALID_VALUE;
  if (threads > function->max_threads) return LAUNCH_OUT_OF_RESOURCES;
  for (u32 i = 0; i < c.numAttrs; i++) {
    if (c.attrs[i].id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) return INVALID_VALUE;
    if (architecture < 90) return NOT_SUPPORTED;  // what a driver does then is undocumented: never ask for it
  }
  const CUlaunchAttribute attribute = c.numAttrs ? c.attrs[0] : CUlaunchAttribute{};
  const u64 numbers[] = {c.gridDimX, c.gridDimY, c.gridDimZ, c.blockDimX, c.blockDimY, c.blockDimZ, c.sharedMemBytes,
                         (u64)c.hStream, c.numAttrs, (u64)attribute.id,
                         (u64)attribute.value.programmaticStreamSerializationAllowed, (u64)function->carveout};
  std::memcpy(launched, numbers, sizeof launched);

  // The bytes that the GPU's kernel finds in its constant memory.
  struct Values {
    char constants[4096];
    std::vector<void*> addresses;
  };
  const auto values = std::make_shared<Values>();
  for (const auto& [ordinal, parameter] : function->parameters) {
    std::memcpy(&values->constants[parameter.offset], parameters[ordinal], parameter.bytes);
    values->addresses.push_back(&values->constants[parameter.offset]);
  }
  return submit(c.hStream, function->name, [=, c = *config]() -> const char* {
    const auto emulated = [&](const std::string& name) { return dlsym(function->library, name.c_str()); };
    const auto make = (void* (*)(u32, u32, u32, u32, u32, void**))emulated("make_" + function->name);
    void* launch = make(c.gridDimX, c.gridDimY, c.gridDimZ, c.blockDimX, c.sharedMemBytes, values->addresses.data());
    for (const auto& [begin, end] : tensors) ((void (*)(void*, u64, u64))emulated("give"))(launch, begin, end);
    const char* fault = ((const char* (*)(void*, u32, u64))emulated("begin"))(launch, 0, ++seed);
    if (!fault) fault = ((const char* (*)(void*))emulated("end"))(launch);
    ((void (*)(void*))emulated("forget"))(launch);
    return fault;
  });
}
