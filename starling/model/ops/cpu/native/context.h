// A thread pool, the kernels of one instruction set, and scratch memory: the operations, spread over the threads.
#pragma once
#include <cstdlib>
#include <memory>
#include <vector>

#include "pool.h"
#include "types.h"

// Memory that grows on demand; growing drops its contents.
template <class T> class Scratch {
 public:
  T* get(size_t count) {
    if (count > size_) {
      free(data_);
      // Whole cache lines and one more, so that a kernel may read ahead.
      data_ = (T*)aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64);
      if (!data_) abort();
      size_ = count;
    }
    return data_;
  }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(data_); }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

class Context {
 public:
  Context(int threads, const Kernels* kernels) : pool_(threads), kernels_(kernels) {}

  // y [tokens, rows] = x [tokens, columns] W. prompt_tokens (may be null) marks the rows that kAuto computes in int8.
  void linear(const Linear& w, const float* x, int64_t tokens, const uint8_t* prompt_tokens, Precision precision,
              float* y);
  // out [tokens, hidden] = norm(residual += x), or norm(residual) where x is null.
  void add_norm(const float* x, float* residual, const uint16_t* weight, float* out, int64_t tokens, int64_t hidden,
                float eps);
  void rotate_and_write(const RotaryWrite& write, int64_t tokens);
  void attention(const Attention& a);
  void silu_mul(const float* gate_up, float* out, int64_t tokens, int64_t intermediate);
  void embed(const int64_t* ids, const uint16_t* table, float* out, int64_t tokens, int64_t hidden);
  // See Ops.sample; the settings are [tokens], `ids` receives the choices.
  void sample(const float* logits, int64_t tokens, int64_t vocabulary, const double* temperature, const int64_t* top_k,
              const double* top_p, const double* min_p, const double* uniform, int64_t* ids);
  // All layers: x [tokens, hidden] holds the embeddings, and is overwritten. The first rows of `residual` receive
  // the last layer's output for the step's `logit_rows`.
  void layers(const Layer* layers, int64_t count, const Shape& shape, const Step& step, const float* rotary,
              Precision precision, float* x, float* residual);
  void pack_awq(const uint32_t* qweight, const uint32_t* qzeros, const uint16_t* scales, const Linear& out);
  void pack_half(const uint16_t* matrix, const Linear& out);

 private:
  void pass(const Linear& w, const float* x, int64_t tokens, const uint8_t* prompt_tokens, Precision precision,
            float* y);

  Pool pool_;
  const Kernels* kernels_;
  std::vector<int32_t> order_;
  std::vector<uint8_t> last_prompt_tokens_;
  std::vector<Tile> tiles_;
  std::vector<AttentionItem> items_;
  Scratch<int8_t> planes_;
  Scratch<float> scales_, partials_, normed_, qkv_, q_, attended_, gate_up_, act_, probabilities_;
  Scratch<int32_t> minus_sums_;
};
