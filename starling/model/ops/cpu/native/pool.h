// A few threads that share numbered chunks of work. One caller at a time.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  explicit Pool(int threads);  // the caller is one of them; throws std::system_error if they cannot be started
  ~Pool();
  int threads() const { return (int)threads_; }

  // Calls work(i) for every i in [0, count); returns when all are done. Each thread has a run of neighbouring chunks,
  // so that it reads memory sequentially, and helps with the other runs when its own is done.
  template <class Work> void run(int64_t count, const Work& work) {
    if (count <= 1 || threads_ == 1) {
      for (int64_t i = 0; i < count; i++) work(i);
      return;
    }
    start((uint32_t)count, [](const void* w, int64_t i) { (*(const Work*)w)(i); }, &work);
  }

 private:
  using Call = void (*)(const void* work, int64_t i);
  void start(uint32_t count, Call call, const void* work);
  void take_chunks(uint32_t job, int thread);
  void serve(int thread);
  void end();

  // High half: the job's number; low half: the run's next chunk. A chunk is taken by a compare-and-swap of both, so a
  // thread that slept through a job's end cannot touch the next one by mistake.
  struct alignas(64) Run {
    std::atomic<uint64_t> ticket{0};
  };
  const uint32_t threads_;
  std::unique_ptr<Run[]> runs_;  // one per thread
  alignas(64) std::atomic<uint32_t> job_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<uint32_t> open_{0};   // runs that have chunks left
  alignas(64) std::atomic<uint32_t> count_{0};  // read when a thread begins: not on the line of what changes meanwhile
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> work_{nullptr};
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};
