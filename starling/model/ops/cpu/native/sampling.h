// One row of Ops.sample (interface.py), from unnormalised probabilities.
#pragma once
#include <cstdint>

struct Sampling {
  int64_t top_k;       // 0: all
  double top_p;
  double min_p;
  double uniform;
};

// The index of the largest logit, the first on a tie.
int64_t argmax(const float* logits, int64_t count);

// The token drawn from p [count], whose largest is 1; p is filtered in place.
int64_t draw(float* p, int64_t count, const Sampling& s);
