#include "pool.h"

#include <chrono>

namespace {

constexpr auto kSpin = std::chrono::microseconds(200);  // before sleeping: longer than the gap between a step's calls

// Between two polls. Where threads outnumber cores, or share them with other processes, a thread that has work may need
// this core: 16 threads on two cores took 299 ms a step without the yield, and 139 with it; 2 take 130.
inline void pause_or_yield(unsigned spins) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
  if (spins % 64 == 63) std::this_thread::yield();
}

}  // namespace

Pool::Pool(int threads) : threads_(threads), runs_(new Run[threads]) {
  try {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { serve(i); });
  } catch (...) {
    end();
    throw;
  }
}

Pool::~Pool() { end(); }

void Pool::end() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::take_chunks(uint32_t job, int thread) {
  // These may be a later job's already; then its closing tickets are visible too, and no ticket below is `job`'s.
  const uint32_t count = count_.load(std::memory_order_acquire);
  const Call call = call_.load(std::memory_order_acquire);
  const void* work = work_.load(std::memory_order_acquire);
  const uint32_t runs = threads_;
  for (uint32_t i = 0; i < runs; i++) {
    // Usually all chunks are taken by the time a thread's own are done; then it need not look at the other runs.
    if (i > 0 && open_.load(std::memory_order_acquire) == 0) break;
    const uint32_t run = (thread + i) % runs;
    const uint32_t end = (uint64_t)count * (run + 1) / runs;
    std::atomic<uint64_t>& next = runs_[run].ticket;
    uint64_t ticket = next.load(std::memory_order_acquire);
    uint32_t done = 0;
    while (ticket >> 32 == job && (uint32_t)ticket < end) {
      if (!next.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      if ((uint32_t)ticket + 1 == end) open_.fetch_sub(1, std::memory_order_acq_rel);
      call(work, (uint32_t)ticket);
      done++;
      ticket = next.load(std::memory_order_acquire);
    }
    if (done) done_.fetch_add(done, std::memory_order_release);  // once per run, since all threads write here
  }
}

void Pool::start(uint32_t count, Call call, const void* work) {
  const uint32_t job = job_.load(std::memory_order_relaxed) + 1, runs = threads_;
  // Closing tickets, beyond any count, before the previous job's fields change.
  for (uint32_t run = 0; run < runs; run++) runs_[run].ticket.store(~0ull, std::memory_order_release);
  done_.store(0, std::memory_order_relaxed);
  open_.store(count < runs ? count : runs, std::memory_order_relaxed);
  count_.store(count, std::memory_order_release);
  call_.store(call, std::memory_order_release);
  work_.store(work, std::memory_order_release);
  for (uint32_t run = 0; run < runs; run++)
    runs_[run].ticket.store((uint64_t)job << 32 | (uint64_t)count * run / runs, std::memory_order_release);
  job_.store(job, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) > 0) {
    { std::lock_guard<std::mutex> lock(mutex_); }  // a worker that just saw no job is waiting by now
    wake_.notify_all();  // with the lock released, which each worker needs to go on
  }
  take_chunks(job, 0);
  for (unsigned spins = 0; done_.load(std::memory_order_acquire) < count; spins++) pause_or_yield(spins);
}

void Pool::serve(int thread) {
  uint32_t seen = 0;
  auto idle_since = std::chrono::steady_clock::now();
  for (unsigned spins = 0; !stop_.load(std::memory_order_relaxed); spins++) {
    const uint32_t job = job_.load(std::memory_order_acquire);
    if (job != seen) {
      seen = job;
      take_chunks(job, thread);
      idle_since = std::chrono::steady_clock::now();
      continue;
    }
    pause_or_yield(spins);
    if (spins % 64 || std::chrono::steady_clock::now() - idle_since < kSpin) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return stop_ || job_.load(std::memory_order_seq_cst) != seen; });
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
    idle_since = std::chrono::steady_clock::now();
  }
}
