#include "sampling.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

// Floats in [0, 1] fall into buckets by exponent and 4 bits of mantissa; a larger one never lies in a lower bucket.
constexpr int kShift = 19;
constexpr int kBuckets = (0x3F800000 >> kShift) + 1;

int bucket_of(float p) {
  uint32_t bits;
  memcpy(&bits, &p, sizeof bits);
  return std::min((int)(bits >> kShift), kBuckets - 1);  // a NaN, from broken logits, has larger bits than 1
}

// Keep the likeliest tokens until `rank` of them are kept or their sum reaches `mass`, whichever comes first; at least
// one. Equal p rank by id. Only the bucket in which that happens is sorted.
void keep_likeliest(float* p, int64_t count, int64_t rank, double mass) {
  int64_t counts[kBuckets] = {};
  double sums[kBuckets] = {};
  for (int64_t i = 0; i < count; i++) {
    const int b = bucket_of(p[i]);
    counts[b]++;
    sums[b] += p[i];
  }
  int64_t kept = 0;
  double sum = 0;
  int b = kBuckets - 1;
  while (b > 0 && kept + counts[b] < rank && sum + sums[b] < mass) {
    kept += counts[b];
    sum += sums[b--];
  }
  std::vector<int64_t> ids;
  ids.reserve(counts[b]);
  for (int64_t i = 0; i < count; i++) {
    const int bucket = bucket_of(p[i]);
    if (bucket == b) ids.push_back(i);
    else if (bucket < b) p[i] = 0;
  }
  std::sort(ids.begin(), ids.end(), [p](int64_t i, int64_t j) { return p[i] != p[j] ? p[i] > p[j] : i < j; });
  for (int64_t id : ids) {
    if (kept > 0 && (kept >= rank || sum >= mass)) {
      p[id] = 0;
    } else {
      kept++;
      sum += p[id];
    }
  }
}

double total_of(const float* p, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; i++) total += p[i];
  return total;
}

}  // namespace

int64_t argmax(const float* logits, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; i++) {
    if (logits[i] > logits[best]) best = i;
  }
  return best;
}

int64_t draw(float* p, int64_t count, const Sampling& s) {
  constexpr double kAnyMass = 1e300;
  if (s.min_p > 0) {
    for (int64_t i = 0; i < count; i++) p[i] = p[i] >= s.min_p ? p[i] : 0;
  }
  if (s.top_k > 0 && s.top_k < count) keep_likeliest(p, count, s.top_k, kAnyMass);
  if (s.top_p < 1) keep_likeliest(p, count, count, s.top_p * total_of(p, count));
  const double target = s.uniform * total_of(p, count);
  double sum = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < count; i++) {
    if (p[i] == 0) continue;
    sum += p[i];
    last = i;
    if (sum > target) break;
  }
  return last;
}
