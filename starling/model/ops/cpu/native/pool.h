// A few threads that share out numbered chunks of work. One caller at a time.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  explicit Pool(int threads);  // the caller is one of them
  ~Pool();
  int threads() const { return (int)workers_.size() + 1; }

  // Calls work(i) for every i in [0, count), on whichever threads are free; returns when all are done.
  template <class Work> void run(int64_t count, const Work& work) {
    if (count <= 1 || workers_.empty()) {
      for (int64_t i = 0; i < count; i++) work(i);
      return;
    }
    start((uint32_t)count, [](const void* w, int64_t i) { (*(const Work*)w)(i); }, &work);
  }

 private:
  using Call = void (*)(const void* work, int64_t i);
  void start(uint32_t count, Call call, const void* work);
  void take_chunks(uint64_t ticket);
  void serve();

  // High half: the job's number; low half: its next chunk. A chunk is taken by a compare-and-swap of both, so a thread
  // that slept through a job's end cannot touch the next one by mistake.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  std::atomic<uint32_t> count_{0};
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> work_{nullptr};
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};
