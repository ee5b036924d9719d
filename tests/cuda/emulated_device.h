// device.h on a CPU: a thread of the device is a fiber, and fibers run one at a time, in random order between barriers,
// and some warps of a block far ahead of others, so that a missing barrier shows. Asynchronous copies happen when they
// are waited for, and not before; shared memory holds NaN at first; addresses must be aligned as the device asks. Some
// blocks of a kernel may begin before the kernel before it has run, as far as wait_for_kernel_before().
#ifndef STARLING_DEVICE_H
#define STARLING_DEVICE_H

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <math.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef long long i64;
typedef u16 half_t;
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct Index { u32 x, y, z; };

#define KERNEL(...) static void
#define DEVICE static inline
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __global__

namespace emulator {

constexpr int kStackBytes = 128 << 10;
constexpr int kWarp = 32;

struct Copy { void* to; const void* from; bool valid; };

struct Barrier { int waiting = 0; u32 generation = 0; };

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool started = false, ended = false;
  bool waited = false;  // for the kernel before; `held` until that has run
  bool held = false;
  Barrier* barrier = nullptr;  // what it waits for, and until which generation has passed
  u32 generation = 0;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;
};

struct Block {
  int threads = 0, alive = 0, current = 0;
  Index index, grid;
  bool early = false;  // the kernel before has not run yet
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  std::vector<u8> shared;  // aligned by hand
  u8* memory = nullptr;
  u64 exchange[1024];      // a word of each thread, for warp operations
  u32 fragments[1024][10];
  void (*run)(void**) = nullptr;
  void** arguments = nullptr;
  std::vector<std::unique_ptr<u8[]>> stacks;
};

inline Block* block;  // the one at work
inline jmp_buf home;
inline ucontext_t home_context;
inline u64 random_state = 1;
inline const char* failure = nullptr;  // ends the grid
inline std::vector<std::unique_ptr<u8[]>> spare_stacks;

inline u32 random_below(u32 n) {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return (u32)(random_state >> 33) % n;
}

}  // namespace emulator

inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

[[noreturn]] inline void fail(const char* what) {  // in a fiber
  failure = what;
  _longjmp(home, 1);
}

inline int alive_in(int warp) {
  int alive = 0;
  for (int i = warp * kWarp; i < (warp + 1) * kWarp; i++) alive += !block->fibers[i].ended;
  return alive;
}

inline void pass_if_full(Barrier& barrier, int alive) {
  if (barrier.waiting && barrier.waiting == alive) barrier.waiting = 0, barrier.generation++;
}

inline void wait_at(Barrier& barrier, int alive) {
  Fiber& fiber = block->fibers[block->current];
  fiber.barrier = &barrier;
  fiber.generation = barrier.generation;
  barrier.waiting++;
  pass_if_full(barrier, alive);
  if (!_setjmp(fiber.at)) _longjmp(home, 1);
}

inline void warp_barrier() {
  const int warp = block->current / kWarp;
  wait_at(block->warps[warp], alive_in(warp));
}

inline void finish(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.valid) std::memcpy(copy.to, copy.from, 16);
    else std::memset(copy.to, 0, 16);
  }
  copies.clear();
}

inline void fiber_main() {
  block->run(block->arguments);
  Fiber& fiber = block->fibers[block->current];
  if (!fiber.waited) fail("a thread ends without having waited for the kernel before");
  for (auto& group : fiber.groups) finish(group);
  fiber.ended = true;
  block->alive--;
  const int warp = block->current / kWarp;
  pass_if_full(block->warps[warp], alive_in(warp));
  pass_if_full(block->all, block->alive);
  _longjmp(home, 1);
}

inline std::unique_ptr<Block> make_block(Index index, Index grid, int threads, int shared_bytes) {
  std::unique_ptr<Block> made(new Block);
  made->index = index, made->grid = grid;
  made->threads = made->alive = threads;
  made->fibers.resize(threads);
  made->warps.resize(threads / kWarp);
  made->shared.assign(shared_bytes + 128, 0xff);  // NaN, as fp16 and as float32
  made->memory = (u8*)(((uintptr_t)made->shared.data() + 127) & ~(uintptr_t)127);
  for (int i = 0; i < threads; i++) {
    if (spare_stacks.empty()) spare_stacks.emplace_back(new u8[kStackBytes]);
    made->stacks.push_back(std::move(spare_stacks.back()));
    spare_stacks.pop_back();
  }
  return made;
}

// To the end; one that is early until all of its threads wait for the kernel before.
inline void run_block(Block& running) {
  block = &running;
  blockIdx = running.index, gridDim = running.grid, blockDim = {(u32)running.threads, 1, 1};
  const int threads = running.threads;
  std::vector<int> ready(threads), patient;
  std::vector<u32> patience(threads / kWarp);  // a warp runs in one of so many rounds, unless no other could
  for (u32& rounds : patience) rounds = 1u << 3 * random_below(4);
  while (running.alive) {
    ready.clear(), patient.clear();
    bool any_held = false;
    for (int warp = 0; warp < threads / kWarp; warp++) {
      std::vector<int>& list = random_below(patience[warp]) ? patient : ready;
      for (int i = warp * kWarp; i < (warp + 1) * kWarp; i++) {
        Fiber& fiber = running.fibers[i];
        any_held |= fiber.held;
        if (fiber.ended || fiber.held) continue;
        if (!fiber.barrier || fiber.barrier->generation != fiber.generation) list.push_back(i);
      }
    }
    if (ready.empty()) ready.swap(patient);
    if (ready.empty() && any_held) return;
    if (ready.empty()) failure = "threads wait for each other at different barriers";
    if (failure) return;
    for (int left = (int)ready.size(); left > 0; left--) {
      const int pick = (int)random_below(left);
      running.current = ready[pick];
      ready[pick] = ready[left - 1];
      Fiber& fiber = running.fibers[running.current];
      fiber.barrier = nullptr;
      threadIdx = {(u32)running.current, 0, 0};
      if (_setjmp(home)) {
        if (failure) return;
        continue;
      }
      if (fiber.started) _longjmp(fiber.at, 1);
      fiber.started = true;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = running.stacks[running.current].get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, (void (*)())fiber_main, 0);
      setcontext(&fiber.context);
    }
  }
  for (auto& stack : running.stacks) spare_stacks.push_back(std::move(stack));
}

inline void check_aligned(const void* address, uintptr_t bytes) {
  if ((uintptr_t)address % bytes) fail("an address is not aligned for its access");
}

inline void check_shared(const void* address, int bytes) {
  const u8* at = (const u8*)address;
  if (at < block->memory || at + bytes > block->shared.data() + block->shared.size())
    fail("an address lies outside the block's shared memory");
}

template <class T> T exchange(T x, int from) {
  static_assert(sizeof(T) <= 8, "");
  u64 word = 0;
  std::memcpy(&word, &x, sizeof(T));
  block->exchange[block->current] = word;
  warp_barrier();
  word = block->exchange[block->current / kWarp * kWarp + from];
  warp_barrier();
  std::memcpy(&x, &word, sizeof(T));
  return x;
}

inline int lane() { return block->current % kWarp; }

template <class... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*(std::remove_reference_t<Parameters>*)arguments[I]...);
}
template <class... Parameters> void call(void (*kernel)(Parameters...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<Parameters...>{});
}

}  // namespace emulator

// -- what CUDA C++ itself offers ----------------------------------------------------------------------------------

inline void __syncthreads() { emulator::wait_at(emulator::block->all, emulator::block->alive); }
inline void __syncwarp(u32 = 0xffffffffu) { emulator::warp_barrier(); }
inline void __threadfence() {}
template <class T> T __shfl_sync(u32, T x, int from) { return emulator::exchange(x, from & 31); }
template <class T> T __shfl_xor_sync(u32, T x, int mask) { return emulator::exchange(x, emulator::lane() ^ mask); }
template <class T> T __shfl_down_sync(u32, T x, int by) {
  return emulator::exchange(x, emulator::lane() + by < 32 ? emulator::lane() + by : emulator::lane());
}
template <class T> T __shfl_up_sync(u32, T x, int by) {
  return emulator::exchange(x, emulator::lane() >= by ? emulator::lane() - by : emulator::lane());
}
inline u32 __ballot_sync(u32, int x) {
  using namespace emulator;
  block->exchange[block->current] = x != 0;
  warp_barrier();
  u32 bits = 0;
  for (int i = 0; i < kWarp; i++) bits |= (u32)block->exchange[block->current / kWarp * kWarp + i] << i;
  warp_barrier();
  return bits;
}
inline int __any_sync(u32, int x) { return __ballot_sync(0, x) != 0; }
inline int __all_sync(u32, int x) { return __ballot_sync(0, x) == 0xffffffffu; }
template <class T> T atomicAdd(T* at, T x) { T before = *at; *at = before + x; return before; }
template <class T> T atomicMax(T* at, T x) { T before = *at; *at = before < x ? x : before; return before; }
template <class T> T atomicMin(T* at, T x) { T before = *at; *at = x < before ? x : before; return before; }
template <class T> T atomicOr(T* at, T x) { T before = *at; *at = before | x; return before; }
template <class T> T atomicExch(T* at, T x) { T before = *at; *at = x; return before; }
template <class T> T atomicCAS(T* at, T expected, T x) {
  T before = *at;
  if (before == expected) *at = x;
  return before;
}
inline u32 __float_as_uint(float x) { u32 y; std::memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(u32 x) { float y; std::memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline float __int_as_float(int x) { return __uint_as_float((u32)x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((u32)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }

inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline u64 __umul64hi(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
template <class T> T __ldg(const T* at) { return *at; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
using std::isnan, std::isinf;  // the others are in the global namespace, as <math.h> has them

// -- device.h -----------------------------------------------------------------------------------------------------

DEVICE u8* shared_memory() { return emulator::block->memory; }

DEVICE float half_to_float(half_t x) { _Float16 h; std::memcpy(&h, &x, 2); return (float)h; }
DEVICE half_t float_to_half(float x) { const _Float16 h = (_Float16)x; half_t y; std::memcpy(&y, &h, 2); return y; }
DEVICE u32 pack_halves(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }
DEVICE float low_half(u32 x) { return half_to_float((half_t)x); }
DEVICE float high_half(u32 x) { return half_to_float((half_t)(x >> 16)); }
DEVICE u32 and_or(u32 x, u32 mask, u32 bits) { return (x & mask) | bits; }
DEVICE u32 half2_sub(u32 a, u32 b) { return pack_halves(low_half(a) - low_half(b), high_half(a) - high_half(b)); }
DEVICE u32 half2_mul(u32 a, u32 b) { return pack_halves(low_half(a) * low_half(b), high_half(a) * high_half(b)); }
DEVICE half_t half_fma(float a, float b, float c) {
  const _Float16 h = (_Float16)((double)a * b + c);
  half_t y;
  std::memcpy(&y, &h, 2);
  return y;
}
DEVICE u32 half2_fma(u32 a, u32 b, u32 c) {
  return half_fma(low_half(a), low_half(b), low_half(c)) |
         (u32)half_fma(high_half(a), high_half(b), high_half(c)) << 16;
}

DEVICE float fast_exp2(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

DEVICE void mma_16x8x16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  using namespace emulator;
  const int first = block->current / kWarp * kWarp, g = lane() / 4, t = lane() % 4;
  std::memcpy(block->fragments[block->current], a, 16);
  std::memcpy(block->fragments[block->current] + 4, b, 8);
  warp_barrier();
  for (int i = 0; i < 4; i++) {
    const int row = g + (i / 2) * 8, column = 2 * t + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      const int word = k / 8, owner = k % 8 / 2;
      const u32 left = block->fragments[first + row % 8 * 4 + owner][word * 2 + row / 8];
      const u32 right = block->fragments[first + column * 4 + owner][4 + word];
      sum += (k % 2 ? high_half(left) : low_half(left)) * (k % 2 ? high_half(right) : low_half(right));
    }
    c[i] += sum;
  }
  warp_barrier();
}

namespace emulator {
inline void matrices(u32 (&m)[4], const void* row, bool transposed) {
  check_aligned(row, 16);
  check_shared(row, 16);
  block->exchange[block->current] = (u64)(uintptr_t)row;
  warp_barrier();
  const int first = block->current / kWarp * kWarp, g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; i++) {
    const auto at = [&](int r, int column) {
      return (u32)((const u16*)(uintptr_t)block->exchange[first + i * 8 + r])[column];
    };
    m[i] = transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
  }
  warp_barrier();
}
}  // namespace emulator

DEVICE void load_matrices(u32 (&m)[4], const void* row) { emulator::matrices(m, row, false); }
DEVICE void load_matrices_transposed(u32 (&m)[4], const void* row) { emulator::matrices(m, row, true); }

DEVICE void copy_async(void* shared, const void* from, bool valid = true) {
  using namespace emulator;
  check_aligned(shared, 16);
  check_shared(shared, 16);
  if (valid) check_aligned(from, 16);
  block->fibers[block->current].open.push_back({shared, from, valid});
}
DEVICE void copy_async_once(void* shared, const void* from, bool valid = true) { copy_async(shared, from, valid); }
DEVICE void copy_async_commit() {
  emulator::Fiber& fiber = emulator::block->fibers[emulator::block->current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int pending> DEVICE void copy_async_wait() {
  auto& groups = emulator::block->fibers[emulator::block->current].groups;
  while ((int)groups.size() > pending) {
    emulator::finish(groups.front());
    groups.erase(groups.begin());
  }
}

DEVICE void prefetch(const void* from, u32 bytes) {
  emulator::check_aligned(from, 16);
  emulator::check_aligned((const void*)(uintptr_t)bytes, 16);
  for (u32 i = 0; i < bytes; i += 16) (void)((const volatile u8*)from)[i];  // must be there
}

DEVICE void wait_for_kernel_before() {
  using namespace emulator;
  Fiber& fiber = block->fibers[block->current];
  fiber.waited = true;
  fiber.held = block->early;
  if (fiber.held && !_setjmp(fiber.at)) _longjmp(home, 1);
}

#include "collectives.h"

// A kernel over a grid, its blocks in random order.
namespace emulator {
struct Launch {
  void (*kernel)(void**);
  void** arguments;
  Index grid;
  u32 threads, shared_bytes;
  std::vector<std::unique_ptr<Block>> early;
  std::vector<u32> order;  // of the blocks that have not begun; the last comes next

  std::unique_ptr<Block> next() {
    const u32 i = order.back();
    order.pop_back();
    auto made = make_block({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y}, grid, threads, shared_bytes);
    made->run = kernel, made->arguments = arguments;
    return made;
  }
};

// Begins a launch: up to `early` blocks run as far as they can while the kernel before has not run.
inline const char* begin(Launch& launch, u32 early, u64 seed) {
  if (launch.threads == 0 || launch.threads % kWarp || launch.threads > 1024)
    return "a block needs 32 to 1024 threads, in whole warps";
  if (launch.shared_bytes > 99u << 10) return "a block asks for more shared memory than sm_86 has (99 KiB)";
  failure = nullptr;
  random_state = seed | 1;
  const u64 blocks = (u64)launch.grid.x * launch.grid.y * launch.grid.z;
  launch.order.resize(blocks);
  for (u64 i = 0; i < blocks; i++) launch.order[i] = (u32)i;
  for (u64 i = blocks; i > 1; i--) std::swap(launch.order[i - 1], launch.order[random_below((u32)i)]);
  while (launch.early.size() < early && !launch.order.empty() && !failure) {
    launch.early.push_back(launch.next());
    launch.early.back()->early = true;
    run_block(*launch.early.back());
  }
  return failure;
}

// Runs what is left of a launch. Both return what is wrong, null if nothing is.
inline const char* end(Launch& launch) {
  failure = nullptr;
  while (!failure && !(launch.early.empty() && launch.order.empty())) {
    std::unique_ptr<Block> next;
    if (launch.early.empty()) {
      next = launch.next();
    } else {
      next = std::move(launch.early.back());
      launch.early.pop_back();
      next->early = false;
      for (Fiber& fiber : next->fibers) fiber.held = false;
    }
    run_block(*next);
  }
  return failure;
}
}  // namespace emulator

#endif
