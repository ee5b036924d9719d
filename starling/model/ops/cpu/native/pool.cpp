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

Pool::Pool(int threads) : threads_(threads), runs_(new Run[threads]) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { serve(i); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::take_chunks(uint32_t job, int thread) {
  // These may belong to a later job; then that job's closing tickets are visible, and no ticket below is `job`'s.
  const uint32_t count = count_.load(std::memory_order_acquire);
  const Call call = call_.load(std::memory_order_acquire);
  const void* work = work_.load(std::memory_order_acquire);
  const uint32_t runs = threads_;
  for (uint32_t i = 0; i < runs; i++) {
    const uint32_t run = (thread + i) % runs;
    const uint32_t end = (uint64_t)count * (run + 1) / runs;
    std::atomic<uint64_t>& next = runs_[run].ticket;
    uint64_t ticket = next.load(std::memory_order_acquire);
    while (ticket >> 32 == job && (uint32_t)ticket < end) {
      if (!next.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      call(work, (uint32_t)ticket);
      done_.fetch_add(1, std::memory_order_release);
      ticket = next.load(std::memory_order_acquire);
    }
  }
}

void Pool::start(uint32_t count, Call call, const void* work) {
  const uint32_t job = job_.load(std::memory_order_relaxed) + 1, runs = threads_;
  // Closing tickets, past any count, before the last job's fields change.
  for (uint32_t run = 0; run < runs; run++) runs_[run].ticket.store(~0ull, std::memory_order_release);
  done_.store(0, std::memory_order_relaxed);
  count_.store(count, std::memory_order_release);
  call_.store(call, std::memory_order_release);
  work_.store(work, std::memory_order_release);
  for (uint32_t run = 0; run < runs; run++)
    runs_[run].ticket.store((uint64_t)job << 32 | (uint64_t)count * run / runs, std::memory_order_release);
  job_.store(job, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  take_chunks(job, 0);
  for (int spins = 0; done_.load(std::memory_order_acquire) < count; spins++) {
    if (spins < 4000) relax();
    else std::this_thread::yield();  // the last chunk's thread may want this core
  }
}

void Pool::serve(int thread) {
  uint32_t seen = 0;
  auto idle_since = std::chrono::steady_clock::now();
  while (!stop_.load(std::memory_order_relaxed)) {
    const uint32_t job = job_.load(std::memory_order_acquire);
    if (job != seen) {
      seen = job;
      take_chunks(job, thread);
      idle_since = std::chrono::steady_clock::now();
      continue;
    }
    for (int i = 0; i < 64; i++) relax();
    if (std::chrono::steady_clock::now() - idle_since < kSpin) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return stop_ || job_.load(std::memory_order_seq_cst) != seen; });
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
    idle_since = std::chrono::steady_clock::now();
  }
}
