// The CUDA runtime of a GPU that is not there, as far as torch calls it: libcudart.so and, since it includes the
// emulated driver, libcuda.so.
//
// Work is queued on its stream and done as late as the calls allow, or earlier at random: what is read before it was
// waited for is old, and what is overwritten too early is copied wrong. Captures refuse what a real one does. The
// device's memory holds NaN at first. A fault loses the device: every later call fails. Kernels of torch's own are left
// to sitecustomize.py.
//
// Source: CUDA runtime API, "Stream Management" (what a capture prohibits), "API synchronization behavior" (copies).
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "../emulated_driver.cpp"

typedef uint8_t u8;

static long setting(const char* name) { return std::atol(std::getenv((std::string("EMULATED_GPU_") + name).c_str())); }
static const u64 total_bytes = (u64)setting("MEMORY_BYTES");
static const int processors = (int)setting("PROCESSORS");
static const int eagerness = (int)setting("EAGERNESS");  // percent of calls at which the device does some work
static const bool no_kernels = setting("NO_KERNELS");    // they and copies to memory do nothing: it is zero
static long replays_left = setting("LOST_AFTER");        // replays of graphs until the device is lost
static std::mt19937_64 dice(setting("SEED"));

static std::recursive_mutex mutex;
#define LOCK const std::lock_guard<std::recursive_mutex> lock(mutex);
static thread_local cudaError_t last = cudaSuccess;
static cudaError_t lost = cudaSuccess;  // what every call returns once the device is lost
static thread_local bool context_is_current = false;  // once the thread has made one of the runtime's calls

static cudaError_t returned(cudaError_t error) {
  if (error) last = error;
  return error;
}

// An error that torch's message alone would not explain.
static cudaError_t refused(const char* what, cudaError_t error) {
  std::fprintf(stderr, "emulated GPU: %s is refused (%d)\n", what, (int)error);
  return returned(error);
}

[[noreturn]] static void broken(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s\n", what);
  std::abort();
}

// -- memory -----------------------------------------------------------------------------------------------------------

// Twice what the device has, so that allocations of all sizes find room, as its page tables would give them.
static u8* const memory = (u8*)mmap(nullptr, 2 * total_bytes, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
static u64 used_bytes = 0;
static std::map<u64, u64> pinned;  // first byte → end

// Whether [at, at + bytes) lies in one of `ranges`.
static bool lies_in(const std::map<u64, u64>& ranges, const void* at, u64 bytes) {
  auto after = ranges.upper_bound((u64)at);
  return after != ranges.begin() && (u64)at + bytes <= std::prev(after)->second;
}

static bool is_device(const void* at) { return (u8*)at >= memory && (u8*)at < memory + 2 * total_bytes; }

static void check_device(const void* at, u64 bytes) {
  if (!lies_in(tensors, at, bytes)) broken("an operation reaches beyond allocated memory");
}

// -- streams ----------------------------------------------------------------------------------------------------------

struct Queued {
  std::string name;
  Operation run;
};

struct Capture {
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  u64 id;
  bool broken = false;
  std::vector<Queued> work;
};

struct CUstream_st {
  unsigned flags = 0;
  int priority = 0;
  std::deque<Queued> queue;
  u64 submitted = 0, done = 0;
  bool running = false;
  std::unique_ptr<Capture> capture;
};

struct CUevent_st {
  CUstream_st* stream = nullptr;  // null: never recorded
  u64 ticket = 0;                 // has happened once so much of the stream is done
  Capture* capture = nullptr;     // recorded in
  std::shared_ptr<double> at_ms = std::make_shared<double>(0);
};

struct CUgraph_st { std::vector<Queued> work; };
struct CUgraphExec_st { std::vector<Queued> work; };

static CUstream_st legacy;  // the default stream
static std::set<CUstream_st*> streams = {&legacy};
static std::set<CUgraphExec_st*> graphs;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static CUstream_st* known(cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy) return &legacy;
  if (!streams.count(stream)) broken("an unknown stream is used");
  return stream;
}

static void run_one(CUstream_st* stream) {
  if (stream->running) broken("a stream waits for itself");
  stream->running = true;
  const Queued work = std::move(stream->queue.front());
  stream->queue.pop_front();
  if (!lost) {
    if (const char* fault = work.run()) {
      std::fprintf(stderr, "emulated GPU: %s: %s\n", work.name.c_str(), fault);
      lost = cudaErrorIllegalAddress;
    }
  }
  stream->done++;
  stream->running = false;
}

static void run_until(CUstream_st* stream, u64 ticket) {
  while (stream->done < ticket) run_one(stream);
}
static void finish(CUstream_st* stream) { run_until(stream, stream->submitted); }
static void finish_all() {
  for (CUstream_st* stream : streams) finish(stream);
}

static void advance() {
  if ((int)(dice() % 100) >= eagerness) return;
  for (CUstream_st* stream : streams)
    for (u64 count = dice() % 40; count && !stream->running && !stream->queue.empty(); count--) run_one(stream);
}

// Breaks the captures that prohibit this thread's potentially unsafe calls, if any; see
// cudaThreadExchangeStreamCaptureMode.
static bool breaks_a_capture() {
  bool found = false;
  for (CUstream_st* stream : streams) {
    Capture* const capture = stream->capture.get();
    if (!capture || thread_mode == cudaStreamCaptureModeRelaxed) continue;
    const bool own = capture->thread == std::this_thread::get_id();
    const bool prohibits = own ? capture->mode != cudaStreamCaptureModeRelaxed
                               : thread_mode == cudaStreamCaptureModeGlobal &&
                                     capture->mode == cudaStreamCaptureModeGlobal;
    capture->broken |= prohibits;
    found |= prohibits;
  }
  return found;
}

#define BEGIN LOCK context_is_current = true; if (lost) return returned(lost); advance();
#define UNSAFE if (breaks_a_capture()) return refused(__func__, cudaErrorStreamCaptureUnsupported);

static cudaError_t breaks(CUstream_st* stream, const char* what, cudaError_t error) {
  stream->capture->broken = true;
  return refused(what, error);
}

static cudaError_t queue(CUstream_st* stream, const std::string& name, Operation run) {
  if (stream->capture) {
    if (stream->capture->broken) return refused(name.c_str(), cudaErrorStreamCaptureInvalidated);
    stream->capture->work.push_back({name, std::move(run)});
    return cudaSuccess;
  }
  if (!(stream->flags & cudaStreamNonBlocking)) {  // it and the legacy stream wait for each other
    for (CUstream_st* other : streams) {
      if (other == stream || other->flags & cudaStreamNonBlocking || (stream != &legacy && other != &legacy)) continue;
      if (other->capture) return breaks(other, name.c_str(), cudaErrorStreamCaptureImplicit);
      const u64 ticket = other->submitted;
      stream->queue.push_back({"wait", [=]() -> const char* { run_until(other, ticket); return nullptr; }});
      stream->submitted++;
    }
  }
  stream->queue.push_back({name, std::move(run)});
  stream->submitted++;
  return cudaSuccess;
}

static CUresult queue_launch(CUstream_st* stream, const std::string& kernel, const Operation& launch) {
  LOCK
  if (lost) return (CUresult)lost;
  advance();
  if (no_kernels) return SUCCESS;
  return (CUresult)queue(known(stream), kernel, launch);
}

// EMULATED_GPU_KERNELS names a file of lines: a file of machine code, and the emulator's build of the same source.
static void* build_of(const char* image) {
  std::ifstream list(std::getenv("EMULATED_GPU_KERNELS"));
  std::string code, build;
  while (list >> code >> build) {
    std::ifstream file(code, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(file)), {});
    const auto header = at<Elf64_Ehdr>(image);
    const u64 size = std::min<u64>(bytes.size(), header.e_shoff + (u64)header.e_shnum * header.e_shentsize);
    if (std::memcmp(bytes.data(), image, size) == 0) return dlopen(build.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  broken("a kernel is loaded whose emulation was not built");
}

__attribute__((constructor)) static void prepare() {
  architecture = (int)setting("ARCHITECTURE");
  submit = queue_launch;
  find_library = build_of;
  has_context = [] { return context_is_current; };
}

extern "C" {

// -- the device -------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return returned(device ? cudaErrorInvalidDevice : cudaSuccess); }
cudaError_t cudaRuntimeGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* found) { *found = version; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) { *least = 0, *most = -5; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) {
  std::snprintf(id, size, "0000:00:00.0");
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  // CUDA C++ programming guide, "Technical Specifications per Compute Capability"
  const int shared = architecture >= 90 ? 228 << 10 : architecture == 80 ? 164 << 10 : 100 << 10;
  cudaDeviceProp p{};
  std::strcpy(p.name, "Emulated GPU");
  p.major = architecture / 10, p.minor = architecture % 10;
  p.totalGlobalMem = total_bytes, p.l2CacheSize = 6 << 20, p.memoryBusWidth = 384;
  p.multiProcessorCount = processors, p.warpSize = 32;
  p.sharedMemPerBlock = 48 << 10, p.sharedMemPerBlockOptin = shared - 1024, p.reservedSharedMemPerBlock = 1024;
  p.sharedMemPerMultiprocessor = shared, p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.maxThreadsPerBlock = 1024, p.maxBlocksPerMultiProcessor = 16;
  p.maxThreadsPerMultiProcessor = architecture == 86 || architecture == 89 ? 1536 : 2048;
  for (int axis = 0; axis < 3; axis++)
    p.maxThreadsDim[axis] = 1024, p.maxGridSize[axis] = axis ? 65535 : 0x7fffffff;
  p.unifiedAddressing = p.concurrentKernels = 1, p.asyncEngineCount = 2;
  *found = p;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, 0);
  const std::map<cudaDeviceAttr, u64> known = {
      {cudaDevAttrMultiProcessorCount, p.multiProcessorCount},
      {cudaDevAttrComputeCapabilityMajor, p.major},
      {cudaDevAttrComputeCapabilityMinor, p.minor},
      {cudaDevAttrMaxSharedMemoryPerBlock, p.sharedMemPerBlock},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, p.sharedMemPerBlockOptin}};
  const auto found = known.find(which);
  *value = found == known.end() ? 0 : (int)found->second;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  BEGIN
  for (CUstream_st* stream : streams)
    if (stream->capture) return breaks(stream, __func__, cudaErrorStreamCaptureUnsupported);
  finish_all();
  return returned(lost);
}

cudaError_t cudaPeekAtLastError() { return lost ? lost : last; }
cudaError_t cudaGetLastError() {
  const cudaError_t found = std::exchange(last, cudaSuccess);
  return lost ? lost : found;
}
const char* cudaGetErrorName(cudaError_t) { return "an error of the emulated GPU"; }
const char* cudaGetErrorString(cudaError_t error) {
  static thread_local char text[64];
  const char* const what = error == cudaErrorMemoryAllocation ? "out of memory" : "emulated GPU, error";
  std::snprintf(text, sizeof text, "%s %d", what, (int)error);
  return text;
}

// -- memory -----------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** made, size_t bytes) {
  BEGIN UNSAFE
  bytes = (bytes + 511) / 512 * 512;
  u64 begin = (u64)memory;
  for (const auto& [first, end] : tensors) {
    if (first - begin >= bytes) break;
    begin = end;
  }
  if (used_bytes + bytes > total_bytes || begin + bytes > (u64)memory + 2 * total_bytes)
    return returned(cudaErrorMemoryAllocation);
  used_bytes += bytes;
  tensors[begin] = begin + bytes;
  *made = (void*)begin;
  if (!no_kernels) std::memset(*made, 0xff, bytes);  // NaN, as fp16 and as float32
  return cudaSuccess;
}

cudaError_t cudaFree(void* begin) {
  BEGIN UNSAFE
  if (!begin) return cudaSuccess;
  finish_all();
  const auto found = tensors.find((u64)begin);
  if (found == tensors.end()) return refused(__func__, cudaErrorInvalidValue);
  const u64 bytes = found->second - found->first;
  madvise(begin, bytes, MADV_DONTNEED);
  used_bytes -= bytes;
  tensors.erase(found);
  return returned(lost);
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  BEGIN
  *free = total_bytes - used_bytes, *total = total_bytes;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** made, size_t bytes, unsigned) {
  BEGIN UNSAFE
  *made = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  pinned[(u64)*made] = (u64)*made + bytes;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* begin) {
  BEGIN UNSAFE
  finish_all();
  pinned.erase((u64)begin);
  std::free(begin);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* at) {
  LOCK
  *found = {};
  found->type = is_device(at)               ? cudaMemoryTypeDevice
                : lies_in(pinned, at, 1) ? cudaMemoryTypeHost
                                            : cudaMemoryTypeUnregistered;
  if (found->type) found->devicePointer = (void*)at;
  if (!is_device(at)) found->hostPointer = (void*)at;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t handle) {
  BEGIN
  CUstream_st* const stream = known(handle);
  for (const void* end : {(const void*)to, from})
    if (is_device(end)) check_device(end, bytes);
  const bool stages = !is_device(from) && !lies_in(pinned, from, bytes);
  const bool waits = !is_device(to) && !lies_in(pinned, to, bytes);
  if (stream->capture && (stages || waits)) return breaks(stream, __func__, cudaErrorStreamCaptureUnsupported);
  Operation copy = [=]() -> const char* { std::memcpy(to, from, bytes); return nullptr; };
  if (stages) {
    const auto staged = std::make_shared<std::vector<u8>>((const u8*)from, (const u8*)from + bytes);
    copy = [=]() -> const char* { std::memcpy(to, staged->data(), bytes); return nullptr; };
  }
  if (no_kernels && is_device(to)) copy = []() -> const char* { return nullptr; };
  const cudaError_t error = queue(stream, "a copy", copy);
  if (error || !(waits || (stages && bytes > 64 << 10))) return returned(error);
  finish(stream);
  return returned(lost);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  BEGIN
  check_device(to, bytes);
  const Operation set = [=]() -> const char* {
    if (!no_kernels) std::memset(to, value, bytes);
    return nullptr;
  };
  return returned(queue(known(stream), "a memset", set));
}

// -- streams and events -----------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* made, unsigned flags, int priority) {
  BEGIN
  *made = new CUstream_st;
  (*made)->flags = flags, (*made)->priority = priority;
  streams.insert(*made);
  return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  LOCK
  *priority = known(stream)->priority;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  BEGIN
  CUstream_st* const stream = known(handle);
  if (stream->capture) return breaks(stream, __func__, cudaErrorStreamCaptureUnsupported);
  UNSAFE
  finish(stream);
  return returned(lost);
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  BEGIN
  CUstream_st* const stream = known(handle);
  if (stream->capture) return breaks(stream, __func__, cudaErrorStreamCaptureUnsupported);
  if (stream->done < stream->submitted) run_one(stream);
  return stream->done < stream->submitted ? cudaErrorNotReady : returned(lost);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned) {
  BEGIN
  *made = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* made) { return cudaEventCreateWithFlags(made, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  LOCK
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  BEGIN
  CUstream_st* const stream = known(handle);
  event->capture = stream->capture.get();
  if (stream->capture) return cudaSuccess;
  const cudaError_t error = queue(stream, "an event", [at_ms = event->at_ms]() -> const char* {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *at_ms = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
    return nullptr;
  });
  event->stream = stream, event->ticket = stream->submitted;
  return returned(error);
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

static bool has_happened(cudaEvent_t event) { return !event->stream || event->stream->done >= event->ticket; }

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  BEGIN
  if (event->capture) return refused(__func__, cudaErrorCapturedEvent);
  UNSAFE
  if (event->stream) run_until(event->stream, event->ticket);
  return returned(lost);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  BEGIN
  if (event->capture) return refused(__func__, cudaErrorCapturedEvent);
  UNSAFE
  if (!has_happened(event)) run_one(event->stream);
  return has_happened(event) ? returned(lost) : cudaErrorNotReady;
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  BEGIN
  if (!has_happened(begin) || !has_happened(end)) return cudaErrorNotReady;
  *ms = (float)(*end->at_ms - *begin->at_ms);
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  BEGIN
  CUstream_st *const stream = known(handle), *const other = event->stream;
  if (event->capture || stream->capture) {
    if (event->capture == stream->capture.get()) return cudaSuccess;
    return stream->capture ? breaks(stream, __func__, cudaErrorStreamCaptureIsolation)
                           : refused(__func__, cudaErrorStreamCaptureIsolation);
  }
  if (!other || other == stream) return cudaSuccess;
  const u64 ticket = event->ticket;
  const Operation wait = [=]() -> const char* { run_until(other, ticket); return nullptr; };
  return returned(queue(stream, "a wait", wait));
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
  BEGIN
  return returned(queue(known(stream), "a call", [=]() -> const char* { call(data); return nullptr; }));
}

// -- captures ---------------------------------------------------------------------------------------------------------

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  BEGIN
  static u64 count = 0;
  CUstream_st* const stream = known(handle);
  if (stream == &legacy) return refused(__func__, cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return refused(__func__, cudaErrorIllegalState);
  stream->capture.reset(new Capture{mode, std::this_thread::get_id(), ++count});
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  BEGIN
  CUstream_st* const stream = known(handle);
  if (!stream->capture) return refused(__func__, cudaErrorIllegalState);
  if (stream->capture->mode != cudaStreamCaptureModeRelaxed && stream->capture->thread != std::this_thread::get_id())
    return breaks(stream, __func__, cudaErrorStreamCaptureWrongThread);
  const std::unique_ptr<Capture> capture = std::move(stream->capture);
  *graph = capture->broken ? nullptr : new CUgraph_st{std::move(capture->work)};
  return capture->broken ? refused(__func__, cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  LOCK
  const Capture* const capture = known(handle)->capture.get();
  *status = !capture          ? cudaStreamCaptureStatusNone
            : capture->broken ? cudaStreamCaptureStatusInvalidated
                              : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** before,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  LOCK
  const Capture* const capture = known(handle)->capture.get();
  if (capture && id) *id = capture->id;
  if (graph) *graph = nullptr;
  if (before) *before = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(handle, status);
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  BEGIN
  graphs.insert(*made = new CUgraphExec_st{graph->work});
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  LOCK
  *count = graph->work.size() + no_kernels;  // torch warns of a graph without any
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  LOCK
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  LOCK
  finish_all();
  graphs.erase(graph);
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  BEGIN
  if (replays_left > 0 && --replays_left == 0) return returned(lost = cudaErrorIllegalAddress);
  if (!graphs.count(graph)) return refused(__func__, cudaErrorInvalidValue);
  for (const Queued& work : graph->work)
    if (const cudaError_t error = queue(known(stream), work.name, work.run)) return returned(error);
  return cudaSuccess;
}

// -- torch's own kernels: registered by the hundred when it is loaded, and never launched -----------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

// -- the driver's functions that torch asks for -----------------------------------------------------------------------

static CUresult not_emulated() { return NOT_SUPPORTED; }
CUresult cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { *flags = 0, *active = 1; return SUCCESS; }

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  void* const emulated = dlsym(RTLD_DEFAULT, name);
  *found = emulated ? emulated : (void*)not_emulated;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// Whatever else torch's libraries need to be loaded, listed by __main__.py.
#define NOT_EMULATED(name)         \
  int rest_##name() __asm__(#name); \
  int rest_##name() { return refused(#name, cudaErrorNotSupported); }
REST
}
