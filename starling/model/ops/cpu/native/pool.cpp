#include "pool.h"

#include <chrono>

namespace {

constexpr auto kSpin = std::chrono::microseconds(200);  // then sleep: longer than the gap between a step's calls

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this] { serve(); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::take_chunks(uint64_t ticket) {
  const uint64_t job = ticket >> 32;
  // These may belong to a later job than `ticket`; then that job's closing ticket is visible, and the swap fails.
  const uint32_t count = count_.load(std::memory_order_acquire);
  const Call call = call_.load(std::memory_order_acquire);
  const void* work = work_.load(std::memory_order_acquire);
  while (ticket >> 32 == job && (uint32_t)ticket < count) {
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire))
      continue;
    call(work, (uint32_t)ticket);
    done_.fetch_add(1, std::memory_order_release);
    ticket = ticket_.load(std::memory_order_acquire);
  }
}

void Pool::start(uint32_t count, Call call, const void* work) {
  const uint64_t job = ticket_.load(std::memory_order_relaxed) >> 32;
  // A closing ticket, of a number of its own and past any count, before the last job's fields change.
  ticket_.store((job + 1) << 32 | 0xffffffffu, std::memory_order_release);
  done_.store(0, std::memory_order_relaxed);
  count_.store(count, std::memory_order_release);
  call_.store(call, std::memory_order_release);
  work_.store(work, std::memory_order_release);
  const uint64_t ticket = (job + 2) << 32;
  ticket_.store(ticket, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  take_chunks(ticket);
  for (int spins = 0; done_.load(std::memory_order_acquire) < count; spins++) {
    if (spins < 4000) relax();
    else std::this_thread::yield();  // the last chunk's thread may want this core
  }
}

void Pool::serve() {
  uint64_t seen = 0;
  auto idle_since = std::chrono::steady_clock::now();
  while (!stop_.load(std::memory_order_relaxed)) {
    const uint64_t ticket = ticket_.load(std::memory_order_acquire);
    if (ticket >> 32 != seen) {
      seen = ticket >> 32;
      take_chunks(ticket);
      idle_since = std::chrono::steady_clock::now();
      continue;
    }
    for (int i = 0; i < 64; i++) relax();
    if (std::chrono::steady_clock::now() - idle_since < kSpin) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return stop_ || ticket_.load(std::memory_order_seq_cst) >> 32 != seen; });
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
    idle_since = std::chrono::steady_clock::now();
  }
}
