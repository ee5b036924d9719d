// A GPU on a CPU, as far as our kernels use one: what PTX instructions do. ptx.py turns them into C++ that calls this.
//
// A thread of the device is a fiber. Fibers run one at a time, in random order between barriers, with some warps of a
// block far ahead of others, so that a missing barrier shows. Asynchronous copies happen only when they are waited for,
// but those begun ahead of griddepcontrol.wait read at once. Shared memory holds NaN at first; addresses must be
// aligned as the device requires and, in global memory, lie within the tensors that the kernel was given. Two threads
// that access the same memory, at least one of them writing, must have a barrier between them or, if they are of two
// blocks, a fence, an atomic instruction by each at the same place, and another fence, whatever order they came in.
// Some blocks of a kernel may begin before the previous kernel has run, and get as far as griddepcontrol.wait.
#ifndef STARLING_EMULATED_DEVICE_H
#define STARLING_EMULATED_DEVICE_H

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef long long i64;
struct Index { u32 x, y, z; };

namespace emulator {

constexpr int kStackBytes = 128 << 10;
constexpr int kWarp = 32;
constexpr int kUnit = 2;  // bytes of memory that are tracked together: no kernel stores single bytes
constexpr int kPage = 4096;

struct Barrier { int waiting = 0; u32 generation = 0; };

// Which thread touched memory, after how many barriers of its block and of its warp, and fences of its own.
struct Touch {
  u32 block = 0;
  int16_t thread = -1;
  bool atomic = false;
  u16 blocks = 0, warps = 0, fences = 0;
};

struct Unit {
  Touch write, read;              // the latest ones
  Touch other_warp, other_block;  // the latest reads by another warp, and block, than `read`'s
  bool under_way = false;         // an asynchronous copy may write it at any moment
};

// `early`: begun ahead of griddepcontrol.wait, so `bytes` may be what was there before the previous kernel ran.
struct Copy { void* to; const void* from; bool valid; Touch begun; bool early; u8 bytes[16]; };

// What an atomic instruction in global memory makes visible to later ones at that place: what its block did ahead of a
// fence before it. PTX ISA, "Memory Consistency Model": release and acquire patterns; fences are cumulative.
struct Release {
  Touch by;
  u32 before = 0;           // all that its block did ahead of this many barriers
  std::vector<u16> fences;  // and what each thread did ahead of this many of its fences
};

// Global memory during one launch. Other launches come before or after it as a whole.
struct GlobalMemory {
  std::unordered_map<u64, std::unique_ptr<Unit[]>> pages;
  std::unordered_map<u64, std::vector<Release>> releases;  // by the place of the atomic instruction
  std::vector<std::pair<u64, u64>> given;                  // the tensors' first bytes and ends; none: all of memory
};

// A thread executed an atomic instruction at a place with that many releases.
struct Acquire { u64 place; size_t releases; Touch by; };

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool started = false, ended = false;
  bool waited = false;  // for the previous kernel; `held` until that has run
  bool held = false;
  Barrier* barrier = nullptr;  // what it waits at, until generation `generation` has passed
  u32 generation = 0;
  u16 block_barriers = 0, warp_barriers = 0;  // how many it has passed, of those that order memory
  std::vector<u16> fences;                    // for each fence, how many block barriers came before it
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;
};

struct Block {
  int threads = 0, alive = 0, current = 0;
  Index index, grid;
  bool early = false;  // the previous kernel has not run yet
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  std::vector<u8> shared;  // aligned by hand
  u8* memory = nullptr;
  std::vector<Unit> units;
  GlobalMemory* global = nullptr;
  std::vector<Acquire> acquires;
  u64 exchange[1024];      // a word per thread, for warp operations
  u32 fragments[1024][6];
  void (*run)(void**) = nullptr;
  void** arguments = nullptr;
  std::vector<std::unique_ptr<u8[]>> stacks;
};

inline Block* block;  // the one that is running
inline jmp_buf home;
inline u64 random_state = 1;
inline const char* failure = nullptr;  // ends the grid
inline std::vector<std::unique_ptr<u8[]>> spare_stacks;

inline u32 random_below(u32 n) {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return (u32)(random_state >> 33) % n;
}

inline Index threadIdx, blockIdx, blockDim, gridDim;

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

inline Touch touch_now(bool atomic = false) {
  const Fiber& fiber = block->fibers[block->current];
  const Index at = block->index, grid = block->grid;
  return {at.x + grid.x * (at.y + grid.y * at.z), (int16_t)block->current, atomic, fiber.block_barriers,
          fiber.warp_barriers, (u16)fiber.fences.size()};
}

inline bool is_released(const Touch& touch, const Release& release) {
  return touch.block == release.by.block &&
         (touch.blocks < release.before || touch.fences < release.fences[touch.thread]);
}

// Whether what another block did at `place` is visible to this one.
inline bool is_acquired(const Touch& now, const Touch& before, u64 place) {
  for (const Acquire& acquire : block->acquires) {
    if (acquire.place == place && acquire.by.thread == now.thread && before.atomic) return true;
    const std::vector<u16>& fences = block->fibers[acquire.by.thread].fences;
    const bool fenced = fences.size() > acquire.by.fences;
    if (!fenced || (acquire.by.thread != now.thread && fences[acquire.by.fences] >= now.blocks)) continue;
    const std::vector<Release>& releases = block->global->releases[acquire.place];
    for (size_t i = 0; i < acquire.releases; i++)
      if (is_released(before, releases[i])) return true;
  }
  return false;
}

inline void check_order(const Touch& now, const Touch& before, u64 place) {
  if (before.thread < 0 || (before.atomic && now.atomic)) return;
  if (before.block != now.block) {
    if (!is_acquired(now, before, place)) fail("two blocks access memory without fences and an atomic instruction");
    return;
  }
  if (before.thread == now.thread || before.blocks < now.blocks) return;
  if (before.thread / kWarp == now.thread / kWarp && before.warps < now.warps) return;
  fail("two threads access memory without a barrier");
}

// `now` is when the access may have begun: for an asynchronous copy's read, long ago.
inline void meet(Unit& unit, const Touch& now, bool writes, u64 place = 0) {
  if (unit.under_way) fail("a thread uses shared memory that a copy under way may write");
  check_order(now, unit.write, place);
  if (writes) {
    for (const Touch& read : {unit.read, unit.other_warp, unit.other_block}) check_order(now, read, place);
    unit.write = now;
    return;
  }
  const Touch latest = touch_now();
  if (unit.read.thread >= 0 && unit.read.block != latest.block) unit.other_block = unit.read;
  else if (unit.read.thread >= 0 && unit.read.thread / kWarp != latest.thread / kWarp) unit.other_warp = unit.read;
  unit.read = latest;
}

// The running thread touches `bytes` bytes of shared memory, from a host address on.
inline void touch_shared(const u8* address, int bytes, bool writes, bool atomic = false) {
  const u64 from = address - block->memory;
  if (address < block->memory || from + bytes > kUnit * block->units.size())
    fail("an address lies outside the block's shared memory");
  const Touch now = touch_now(atomic);
  for (u64 i = from / kUnit; i <= (from + bytes - 1) / kUnit; i++) meet(block->units[i], now, writes);
}

inline void check_given(u64 address, u64 bytes) {
  const auto& given = block->global->given;
  const auto holds = [&](const auto& tensor) { return address >= tensor.first && address + bytes <= tensor.second; };
  if (!given.empty() && std::none_of(given.begin(), given.end(), holds))
    fail("an address lies outside the tensors that the kernel was given");
}

// The same for global memory, within one page, as aligned accesses are.
inline void touch_global(const u8* address, int bytes, bool writes, const Touch& now) {
  const u64 place = (u64)(uintptr_t)address;
  std::unique_ptr<Unit[]>& page = block->global->pages[place / kPage];
  if (!page) page.reset(new Unit[kPage / kUnit]);
  for (u64 i = place % kPage / kUnit; i <= (place % kPage + bytes - 1) / kUnit; i++) meet(page[i], now, writes, place);
}

inline void fence() {
  Fiber& fiber = block->fibers[block->current];
  fiber.fences.push_back(fiber.block_barriers);
}

// An atomic instruction at a place in global memory.
inline void release_and_acquire(u64 place) {
  Release release;
  release.by = touch_now();
  bool any = false;
  for (const Fiber& fiber : block->fibers) {
    const bool own = &fiber == &block->fibers[release.by.thread];
    u16 count = 0;
    for (u16 barriers : fiber.fences)
      if (own || barriers < release.by.blocks) release.before = std::max<u32>(release.before, barriers), count++;
    any |= count > 0;
    release.fences.push_back(count);
  }
  std::vector<Release>& releases = block->global->releases[place];
  block->acquires.push_back({place, releases.size(), release.by});
  if (any) releases.push_back(std::move(release));
}

// Passes through shared memory: what an instruction's lanes access, 128 bytes at a time, takes one pass if no two of
// its words lie in the same one of 32 banks. Counted if `counting`; lanes' calls are of one instruction if they are on
// the same line and each lane has been there equally often.
struct Passes { u64 least = 0, taken = 0; };
inline bool counting = false;
inline Passes passes;
inline std::map<std::pair<int, int>, int> turns;  // by line and thread
// By line, warp and turn: each lane, its address and bytes.
inline std::map<std::tuple<int, int, int>, std::vector<std::tuple<int, u64, int>>> together;

inline void count_passes() {
  for (auto& [key, lanes] : together) {
    std::map<int, std::set<u64>> words;  // of the lanes that are served at once
    for (const auto& [lane, address, bytes] : lanes)
      for (u64 word = address / 4; word <= (address + bytes - 1) / 4; word++)
        words[lane * std::max(bytes, 4) / 128].insert(word);
    for (const auto& [group, asked] : words) {
      u64 banks[32] = {};
      for (u64 word : asked) banks[word % 32]++;
      passes.least++;
      passes.taken += *std::max_element(banks, banks + 32);
    }
  }
  together.clear();
  turns.clear();
}

inline void set_under_way(const u8* address, bool under_way) {
  for (int i = 0; i < 16; i += kUnit) block->units[(address - block->memory + i) / kUnit].under_way = under_way;
}

inline void finish(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    set_under_way((const u8*)copy.to, false);
    touch_shared((const u8*)copy.to, 16, true);
    if (copy.valid) touch_global((const u8*)copy.from, 16, false, copy.begun);
    if (copy.valid) std::memcpy(copy.to, copy.early ? copy.bytes : copy.from, 16);
    else std::memset(copy.to, 0, 16);
  }
  copies.clear();
}

inline void fiber_main() {
  block->run(block->arguments);
  Fiber& fiber = block->fibers[block->current];
  if (!fiber.waited) fail("a thread ends without having waited for the previous kernel");
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
  made->units.resize(shared_bytes / kUnit);
  for (int i = 0; i < threads; i++) {
    if (spare_stacks.empty()) spare_stacks.emplace_back(new u8[kStackBytes]);
    made->stacks.push_back(std::move(spare_stacks.back()));
    spare_stacks.pop_back();
  }
  return made;
}

// Runs a block to its end, or an early one until all of its threads wait for the previous kernel.
inline void run_block(Block& running) {
  block = &running;
  blockIdx = running.index, gridDim = running.grid, blockDim = {(u32)running.threads, 1, 1};
  const int threads = running.threads;
  std::vector<int> ready(threads), patient;
  std::vector<u32> patience(threads / kWarp);  // a warp runs in one of so many rounds, unless no other can run
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
  count_passes();
  for (auto& stack : running.stacks) spare_stacks.push_back(std::move(stack));
}

inline void check_aligned(const void* address, uintptr_t bytes) {
  if ((uintptr_t)address % bytes) fail("an address is not aligned for its access");
}

inline u32 exchange(u32 x, int from) {
  block->exchange[block->current] = x;
  warp_barrier();
  x = (u32)block->exchange[block->current / kWarp * kWarp + from];
  warp_barrier();
  return x;
}

inline int lane() { return block->current % kWarp; }

// -- instructions: a register is the bits that it holds -----------------------------------------------------------

constexpr u64 dynamic_shared_memory = 1024;  // where a block's begins, in the address space of shared memory

// What to add to an address in shared memory to get the host's.
inline u64 shared_window() { return (u64)(uintptr_t)block->memory - dynamic_shared_memory; }

template <class T> inline T get(u64 bits) {
  T x;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}
template <> inline bool get<bool>(u64 bits) { return bits != 0; }

template <class T> inline u64 put(T x) { return (u64)(i64)x; }  // a signed one is sign-extended to wider registers
template <> inline u64 put<u64>(u64 x) { return x; }
template <> inline u64 put<float>(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
template <> inline u64 put<double>(double x) {
  u64 bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}

template <class T> inline u64 load(const u8* at) {
  T x;
  std::memcpy(&x, at, sizeof(T));
  return put<T>(x);
}
template <class T> inline void store(u8* at, u64 bits) { std::memcpy(at, &bits, sizeof(T)); }

inline u8* host_at(u64 address, int bytes) {
  check_aligned((const void*)address, bytes);
  return (u8*)address;
}
inline u8* shared_at(u64 address, int bytes, bool writes, bool atomic = false, int line = __builtin_LINE()) {
  u8* const at = (u8*)((u32)address + shared_window());
  if (counting) {
    const int turn = turns[{line, block->current}]++;
    together[{line, block->current / kWarp, turn}].emplace_back(lane(), address, bytes);
  }
  touch_shared(at, bytes, writes, atomic);
  return host_at((u64)at, bytes);
}
inline u8* global_at(u64 address, int bytes, bool writes, bool atomic = false) {
  u8* const at = host_at(address, bytes);
  check_given(address, bytes);
  if (atomic) release_and_acquire(address);
  touch_global(at, bytes, writes, touch_now(atomic));
  return at;
}
inline u8* generic_at(u64 address, int bytes, bool writes, int line = __builtin_LINE()) {
  if (address - (u64)block->memory < kUnit * block->units.size())
    return shared_at(address - shared_window(), bytes, writes, false, line);
  const u8* const stack = block->stacks[block->current].get();
  const bool local = address - (u64)(uintptr_t)stack < kStackBytes;
  return local ? host_at(address, bytes) : global_at(address, bytes, writes);
}

template <class T> inline u64 atomic_add(u8* at, u64 operand) {
  const T before = get<T>(load<T>(at));
  store<T>(at, put<T>(before + get<T>(operand)));
  return put<T>(before);
}
template <class T> inline u64 atomic_or(u8* at, u64 operand) {
  const T before = get<T>(load<T>(at));
  store<T>(at, put<T>(before | get<T>(operand)));
  return put<T>(before);
}

// Shifts by the width or more move everything out.
template <class T> inline T shl(T x, u32 by) { return by < 8 * sizeof(T) ? (T)(x << by) : (T)0; }
template <class T> inline T shr(T x, u32 by) {
  return x >> std::min<u32>(by, 8 * sizeof(T) - 1) >> (by >= 8 * sizeof(T));
}

inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 y = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) y |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return y;
}

inline u32 bit_insert(u32 a, u32 b, u32 position, u32 length) {
  const u32 mask = shl<u32>(length < 32 ? (1u << length) - 1 : ~0u, position);
  return (shl<u32>(a, position) & mask) | (b & ~mask);
}

inline u32 bit_reverse(u32 x) {
  u32 y = 0;
  for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
  return y;
}

inline u32 find_highest_shift(u32 x) { return x ? (u32)__builtin_clz(x) : ~0u; }  // how far it is from bit 31
inline u64 multiply_high(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }

inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }
inline float exp2_flushed(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

// -- fp16

inline float half_to_float(u64 x) {
  const u16 bits = (u16)x;
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return (float)h;
}
inline u16 half_bits(_Float16 h) {
  u16 y;
  std::memcpy(&y, &h, 2);
  return y;
}
inline u16 float_to_half(float x) { return half_bits((_Float16)x); }
inline u32 pack_halves(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }
inline float low_half(u32 x) { return half_to_float(x); }
inline float high_half(u32 x) { return half_to_float(x >> 16); }
inline u32 half2_sub(u32 a, u32 b) { return pack_halves(low_half(a) - low_half(b), high_half(a) - high_half(b)); }
inline u32 half2_mul(u32 a, u32 b) { return pack_halves(low_half(a) * low_half(b), high_half(a) * high_half(b)); }
inline u16 half_fma(float a, float b, float c) { return half_bits((_Float16)((double)a * b + c)); }
inline u32 half2_fma(u32 a, u32 b, u32 c) {
  return half_fma(low_half(a), low_half(b), low_half(c)) |
         (u32)half_fma(high_half(a), high_half(b), high_half(c)) << 16;
}

// -- barriers and warps

inline void block_barrier() {
  wait_at(block->all, block->alive);
  block->fibers[block->current].block_barriers++;
}

inline void whole_warp(u64 mask) {
  if ((u32)mask != ~0u) fail("a warp operation by only part of a warp");
}
inline void warp_sync(u64 mask) {
  whole_warp(mask);
  warp_barrier();
  block->fibers[block->current].warp_barriers++;
}

inline u32 ballot(bool mine, u64 mask) {
  whole_warp(mask);
  block->exchange[block->current] = mine;
  warp_barrier();
  u32 bits = 0;
  for (int i = 0; i < kWarp; i++) bits |= (u32)block->exchange[block->current / kWarp * kWarp + i] << i;
  warp_barrier();
  return bits;
}

// PTX ISA, shfl.sync: `clamp` holds the segment's mask in bits 8 to 12, and the last lane (up: the first) in 0 to 4.
// If the source lies outside, a lane keeps its own value and `valid` is false.
inline u32 shuffle(u32 x, int from, bool reaches, bool& valid, u64 mask) {
  whole_warp(mask);
  valid = reaches;
  return exchange(x, reaches ? from : lane());
}
inline u32 shuffle_idx(u32 x, u32 by, u32 clamp, bool& valid, u64 mask) {
  const int segment = clamp >> 8 & 31, first = lane() & segment, from = first | (by & 31 & ~segment);
  return shuffle(x, from, from <= (first | (int)(clamp & 31 & ~segment)), valid, mask);
}
inline u32 shuffle_bfly(u32 x, u32 by, u32 clamp, bool& valid, u64 mask) {
  const int segment = clamp >> 8 & 31, first = lane() & segment, from = lane() ^ (by & 31);
  return shuffle(x, from, from <= (first | (int)(clamp & 31 & ~segment)), valid, mask);
}
inline u32 shuffle_up(u32 x, u32 by, u32 clamp, bool& valid, u64 mask) {
  const int segment = clamp >> 8 & 31, first = lane() & segment, from = lane() - (int)(by & 31);
  return shuffle(x, from, from >= (first | (int)(clamp & 31 & ~segment)), valid, mask);
}

// c += a * b; PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
inline void mma_m16n8k16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
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

inline void load_matrices(u32 (&m)[4], u64 address, bool transposed, int line = __builtin_LINE()) {
  const u16* const row = (const u16*)shared_at(address, 16, false, false, line);
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

// -- asynchronous copies

// Copies 16 bytes, of which `bytes` are read and the rest are zeros.
inline void copy_async(u64 to, u64 from, u64 bytes, int line = __builtin_LINE()) {
  if (bytes != 0 && bytes != 16) fail("a copy of neither 0 nor 16 bytes");
  if (bytes) check_aligned((const void*)from, 16), check_given(from, 16);
  u8* const at = shared_at(to, 16, true, false, line);
  set_under_way(at, true);
  Fiber& fiber = block->fibers[block->current];
  fiber.open.push_back({at, (const void*)from, bytes != 0, touch_now(), !fiber.waited});
  if (bytes && !fiber.waited) std::memcpy(fiber.open.back().bytes, (const void*)from, 16);
}
inline void commit_copies() {
  Fiber& fiber = block->fibers[block->current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
inline void wait_for_copies(int pending) {
  auto& groups = block->fibers[block->current].groups;
  while ((int)groups.size() > pending) {
    finish(groups.front());
    groups.erase(groups.begin());
  }
}

inline void prefetch(u64 from, u32 bytes) {
  check_aligned((const void*)from, 16);
  check_aligned((const void*)(uintptr_t)bytes, 16);
  check_given(from, bytes);
}

inline void wait_for_previous_kernel() {
  Fiber& fiber = block->fibers[block->current];
  fiber.waited = true;
  fiber.held = block->early;
  if (fiber.held && !_setjmp(fiber.at)) _longjmp(home, 1);
}

// -- launches ------------------------------------------------------------------------------------------------------

// A kernel over a grid, its blocks in random order.
struct Launch {
  void (*kernel)(void**);
  void** arguments;
  Index grid;
  u32 threads, shared_bytes;
  GlobalMemory global;
  std::vector<std::unique_ptr<Block>> early;
  std::vector<u32> order;  // of the blocks that have not begun; the last comes next

  std::unique_ptr<Block> next() {
    const u32 i = order.back();
    order.pop_back();
    auto made = make_block({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y}, grid, threads, shared_bytes);
    made->run = kernel, made->arguments = arguments, made->global = &global;
    return made;
  }
};

// Begins a launch: up to `early` blocks run as far as they can before the previous kernel has run.
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

// Runs the rest of a launch. Both return what is wrong, or null.
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
