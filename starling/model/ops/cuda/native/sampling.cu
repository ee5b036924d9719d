// From logits to token ids: shape (penalties, a mask of allowed tokens, the largest logit), weigh (the weights of a
// row's tokens, by chunk and by bin), draw (Ops.sample).
//
// A weight is floor(2^47 e^((l - max) / T)), an integer made of the float32 exponential's own bits. Sums of weights are
// therefore exact in any order, so a draw is the same alone and in any batch, and running sums can be compared with a
// target level by level: 32 ranges of ids, 32 parts of a range, the ids of a part. A token below 2^-47 of the likeliest
// weighs nothing; all such tokens together are less than 65,536 * 2^-47 = 2^-31 of the sum.
//
// top_k and top_p are both "the first token of the ranking (by logit, then by id) at which a running sum passes a
// target": of ones, or of weights. A histogram over 2,048 bins of (max - l) / T says which bin that token is in; the
// bin's tokens are listed (62 bins per factor of e: a few dozen tokens for a trained model) and each counts those
// before it. A bin with more tokens than the list holds is divided by the next 11 bits of the token's rank, as often as
// needed. min_p is a least logit. All three keep the tokens up to one (logit, id) of the ranking, which draw tests.
//
// Predicted cost for one row of 32,002 (128 KB, from L2 after shape's first read). shape and weigh spread it over 32
// blocks: 2 µs each, launch included; they are bound by latency. draw has one block a row, whose multiprocessor issues
// some 2.5 instructions a clock: greedy and uncut rows read one number a chunk, then one chunk (1.5 and 2.5 µs). A row
// that is cut loads the histogram, finds the bin (1.5 µs), passes over the row to list the bin's tokens and again to
// sum what is kept by ranges of ids (13 instructions a token not kept, 1,000 warp-tokens: 3 µs a pass on an A40 or H100
// alike; 50 a token kept, should all be). With both top_k and top_p, one more pass. In all 5 µs greedy, 7 µs uncut,
// 14 µs with one filter, 18 µs with two; 64 rows run in parallel. Only flat rows cost more: a bin of more than 256
// tokens at the cut takes a pass for each division (1 to 4; up to 30 µs each if it holds all tokens).
#include "device.h"

struct Settings {     // one row; SETTINGS in sampling.py. All zeros: greedy, nothing shaped
  u64 uniform;        // * 2^64
  u64 top_p;          // * 2^64; 0 keeps the likeliest. All ones: off
  double span;        // temperature * log(min_p), at most 0; -inf: off
  float inverse;      // 1 / temperature; 0: greedy
  float repetition;   // penalties; read where there is a table
  float frequency;
  float presence;
  int top_k;          // 0: off
  int table;          // 1 + row of the table of counts; 0: no penalties
  int tail;           // first of the tokens in `tail` that the table lacks
  int seen;           // how many of those come before the token to draw
  int commits;        // how many of those this row adds to the table
  int mask;           // 1 + row of the masks; 0: none
};
static_assert(sizeof(Settings) == 64, "");

constexpr u64 kOff = ~0ull;
constexpr int kChunk = 1024, kShapers = 256, kEach = kChunk / kShapers;  // a block's tokens, threads; a thread's tokens
constexpr int kBins = 2048, kBinsPerE = 62;                             // e^-33 < 2^-47, and 33 * 62 < kBins
constexpr u32 kPrompt = 0x80000000u;  // in the table: occurs in the prompt; the other bits: times generated

#define CALLED static __device__ __noinline__  // for bodies used more than once: instructions must be fetched, too

DEVICE float infinity() { return __uint_as_float(0x7f800000u); }

// A number that orders as floats do; NaN is the largest, and both zeros are equal.
DEVICE u32 key_of(float x) {
  if (x != x) return 0xffffffffu;
  const u32 bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float logit_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// Whether top_k or top_p may leave tokens out.
DEVICE bool is_cut(const Settings& s, int vocabulary) {
  return s.inverse > 0 && ((s.top_k > 0 && s.top_k < vocabulary) || s.top_p != kOff);
}

DEVICE u64 warp_largest(u64 x) {
#pragma unroll
  for (int lane = 16; lane; lane /= 2) {
    const u64 other = __shfl_xor_sync(0xffffffffu, x, lane);
    x = x < other ? other : x;
  }
  return x;
}

DEVICE u64 warp_total(u64 x) {
#pragma unroll
  for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

DEVICE int resolve(int id, const int* sampled) { return id >= 0 ? id : sampled[-1 - id]; }

// -- the table of counts ------------------------------------------------------------------------------------------

// Fills a row of the table [V] from a sequence's tokens [tokens_count], the first `prompt` of which came with the
// request.
KERNEL(1024) count(u32* table, int row, const int* tokens, int tokens_count, int prompt, int vocabulary) {
  wait_for_previous_kernel();
  u32* counts = table + (i64)row * vocabulary;
  for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < tokens_count; i += blockDim.x) {
    if (i < prompt) atomicOr(counts + tokens[i], kPrompt);
    else atomicAdd(counts + tokens[i], 1u);
  }
}

// -- shape --------------------------------------------------------------------------------------------------------


// Changes logits float32 [rows][V] in place where a row's settings ask for it, and finds each chunk's largest: its key
// in the high half, ~id in the low. Writes the tokens to be added to the table to `resolved`, indexed as `tail`, for
// draw: by then, `sampled` may hold the new ones. Zeroes the histogram of a row that is cut.
KERNEL(256) shape(float* logits, const Settings* settings, const u32* table, const int* tail, int* resolved,
                  const int* sampled, const u32* masks, u64* largest, u32* counts, u64* weights, int vocabulary) {
  wait_for_previous_kernel();
  const int row = blockIdx.y, first = blockIdx.x * kChunk + threadIdx.x;
  const Settings& s = settings[row];
  if (is_cut(s, vocabulary)) {
    for (int i = blockIdx.x * kShapers + threadIdx.x; i < kBins; i += gridDim.x * kShapers)
      counts[row * kBins + i] = 0, weights[row * kBins + i] = 0;
  }
  float* x = logits + (i64)row * vocabulary;
  float l[kEach];
#pragma unroll
  for (int j = 0; j < kEach; j++) l[j] = first + j * kShapers < vocabulary ? x[first + j * kShapers] : -infinity();
  if (s.table) {
    const u32* of_ids = table + (i64)(s.table - 1) * vocabulary;
    u32 count[kEach];
#pragma unroll
    for (int j = 0; j < kEach; j++) count[j] = first + j * kShapers < vocabulary ? of_ids[first + j * kShapers] : 0;
    for (int k = 0; k < s.seen; k++) {
      const int id = resolve(tail[s.tail + k], sampled);
#pragma unroll
      for (int j = 0; j < kEach; j++) count[j] += id == first + j * kShapers;
      if (blockIdx.x == 0 && threadIdx.x == 0 && k < s.commits) resolved[s.tail + k] = id;
    }
#pragma unroll
    for (int j = 0; j < kEach; j++) {
      if (count[j]) l[j] = l[j] > 0 ? l[j] / s.repetition : l[j] * s.repetition;
      // Three roundings, as in torch.
      const u32 generated = count[j] & ~kPrompt;
      const float penalty = __fadd_rn(__fmul_rn(s.frequency, (float)generated), s.presence);
      if (generated) l[j] = __fadd_rn(l[j], -penalty);
    }
  }
  if (s.mask) {
    const u32* mask = masks + (i64)(s.mask - 1) * ((vocabulary + 31) / 32);
#pragma unroll
    for (int j = 0; j < kEach; j++) {
      const int id = first + j * kShapers;
      if (id < vocabulary && !(mask[id / 32] >> id % 32 & 1)) l[j] = -infinity();
    }
  }
  u64 best = 0;
#pragma unroll
  for (int j = 0; j < kEach; j++) {
    const int id = first + j * kShapers;
    if (id >= vocabulary) continue;
    if (s.table || s.mask) x[id] = l[j];
    const u64 mine = (u64)key_of(l[j]) << 32 | ~(u32)id;
    best = best < mine ? mine : best;
  }
  u64* bests = (u64*)shared_memory();
  best = warp_largest(best);
  if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x < 32) {
    best = warp_largest(threadIdx.x < kShapers / 32 ? bests[threadIdx.x] : 0);
    if (threadIdx.x == 0) largest[row * gridDim.x + blockIdx.x] = best;
  }
}

// -- weigh --------------------------------------------------------------------------------------------------------

struct Row {
  const float* logits;
  int vocabulary;
  float largest, inverse;
  float last;   // the ranking is kept up to this logit and, at this logit, up to this id
  int last_id;
};

DEVICE bool keeps(const Row& row, float l, int id) {  // & and |: no branches
  return (l > row.last) | ((l == row.last) & (id <= row.last_id));
}
DEVICE float exponent_of(const Row& row, float l) { return (l - row.largest) * row.inverse; }

// floor(2^47 e^x), x <= 0: Cephes' expf polynomial, within 2^-23 relative, and the float's bits shifted into place.
DEVICE u64 weight_of(float x) {
  if (!(x > -33.0f)) return 0;
  const float shifted = fmaf(x, 1.44269504088896341f, 12582912.0f);  // 1.5 * 2^23: the sum is rounded to an integer
  const float n = shifted - 12582912.0f;
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = __fadd_rn(fmaf(__fmul_rn(r, r), p, r), 1.0f);  // 0.7 to 1.42
  const u32 bits = __float_as_uint(p);
  const u64 mantissa = (bits & 0x7fffffu) | 0x800000u;
  const int shift = 24 + (int)(bits >> 23) - 127 + (int)(__float_as_uint(shifted) - 0x4b400000u);
  return shift >= 0 ? mantissa << shift : mantissa >> -shift;
}

DEVICE int bin_of(float x) {  // -62 x, rounded; x in (-33, 0]
  return (int)(__float_as_uint(fmaf(x, -(float)kBinsPerE, 8388608.0f)) - 0x4b000000u);
}

// The least float of at least x.
DEVICE float at_least(double x) {
  const float y = (float)x;
  if ((double)y >= x) return y;
  const u32 key = key_of(y);
  return logit_of(key + 1);
}

// The row before a cut: min_p keeps logits of at least max + T log(min_p). Computed by every warp.
DEVICE Row row_of(const float* logits, const Settings& s, u64 best, int row, int vocabulary) {
  const float largest = logit_of((u32)(best >> 32));
  const float least = at_least((double)largest + s.span);
  return {logits + (i64)row * vocabulary, vocabulary, largest, s.inverse, least, vocabulary};
}

DEVICE u64 best_of(const u64* largest, int row, int chunks) {
  u64 best = 0;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < chunks; i += 32) {
    const u64 other = largest[row * chunks + i];
    best = best < other ? other : best;
  }
  return warp_largest(best);
}

DEVICE bool has_token(const Row& row) { return row.largest > -infinity() && row.largest < infinity(); }

// The sum of each chunk's weights and, for a row that is cut, the histogram: tokens per bin, and their weights.
KERNEL(256) weigh(const float* logits, const Settings* settings, const u64* largest, u64* sums, u32* counts,
                  u64* weights, int vocabulary) {
  wait_for_previous_kernel();
  const Settings& s = settings[blockIdx.y];
  if (s.inverse == 0) return;
  const Row row = row_of(logits, s, best_of(largest, blockIdx.y, gridDim.x), blockIdx.y, vocabulary);
  if (!has_token(row)) return;
  const bool cut = is_cut(s, vocabulary);
  float l[kEach];
#pragma unroll
  for (int j = 0; j < kEach; j++) {
    const int id = blockIdx.x * kChunk + j * kShapers + threadIdx.x;
    l[j] = id < vocabulary ? row.logits[id] : -infinity();
  }
  u64 sum = 0;
#pragma unroll
  for (int j = 0; j < kEach; j++) {
    const float x = exponent_of(row, l[j]);
    const u64 weight = l[j] >= row.last ? weight_of(x) : 0;
    sum += weight;
    if (cut && weight) {
      const int bin = blockIdx.y * kBins + bin_of(x);
      atomicAdd(counts + bin, 1u);
      atomicAdd(weights + bin, weight);
    }
  }
  u64* of_warps = (u64*)shared_memory();
  sum = warp_total(sum);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = warp_total(threadIdx.x < kShapers / 32 ? of_warps[threadIdx.x] : 0);
    if (threadIdx.x == 0) sums[blockIdx.y * gridDim.x + blockIdx.x] = sum;
  }
}

// -- draw ---------------------------------------------------------------------------------------------------------

constexpr int kThreads = 1024, kList = 256;

struct Candidate {
  float logit;
  int id;
  u64 weight;
};

struct Shared {
  u64 sums[2][32];
  Candidate list[kList];
  Candidate last;     // the last token that a filter keeps; top_k's has the `weight` of all that are kept
  u32 listed, unused[3];
  u64 weights[kBins];  // the histogram
  u32 counts[kBins];
};
static_assert(sizeof(Shared) == 29216, "DRAW_SHARED_BYTES in sampling.py");

// A token's place in the ranking: 48 bits, lower is earlier.
DEVICE u64 rank_of(float l, int id) { return (u64)~key_of(l) << 16 | (u32)id; }

// The first lane of a warp at which the running sum of x passes `target`, which is reduced by the sum before that lane;
// -1 if none does, and `target` is reduced by the whole sum.
DEVICE int pick(u64 x, u64& target) {
  u64 sum = x;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const u64 before = __shfl_up_sync(0xffffffffu, sum, by);
    if ((int)threadIdx.x % 32 >= by) sum += before;
  }
  const int lane = __ffs(__ballot_sync(0xffffffffu, sum > target)) - 1;
  target -= __shfl_sync(0xffffffffu, lane < 0 ? sum : sum - x, lane < 0 ? 31 : lane);
  return lane;
}

struct Found {
  int index;   // -1: the sum of all does not pass the target
  u64 rest;    // the target less the sum before it
  u64 total;
};

// The first of n <= 65,536 values at which their running sum passes target_of(their sum). For the whole block to call.
template <class Value, class Target> DEVICE Found find(Shared* shared, int n, Value value, Target target_of) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = (n + kThreads - 1) / kThreads;
  u64 sum = 0;
  {
    const int end = min(n, (warp + 1) * 32 * part);
#pragma unroll 4
    for (int i = warp * 32 * part + lane; i < end; i += 32) sum += value(i);
  }
  sum = warp_total(sum);
  if (lane == 0) shared->sums[0][warp] = sum;
  __syncthreads();
  sum = shared->sums[0][lane];
  Found found = {-1, 0, warp_total(sum)};
  u64 target = target_of(found.total);
  if (target < found.total) {
    int first = pick(sum, target) * 32 * part;
    sum = 0;
    {
      const int begin = first + warp * part, end = min(n, begin + part);
      for (int i = begin + lane; i < end; i += 32) sum += value(i);
    }
    sum = warp_total(sum);
    if (lane == 0) shared->sums[1][warp] = sum;
    __syncthreads();
    first += pick(shared->sums[1][lane], target) * part;
    const int end = min(n, first + part);
    for (int i = first; found.index < 0 && i < end; i += 32) {
      const int at = pick(i + lane < end ? value(i + lane) : 0, target);
      if (at >= 0) found.index = i + at;
    }
    found.rest = target;
  }
  __syncthreads();
  return found;
}

// Tokens in bin `bin` whose rank above its lowest `shift` bits is `prefix`.
struct Group {
  int bin, shift;
  u64 prefix;
};

template <class Use> DEVICE void for_each(const Row& row, const Group& group, Use use) {
  constexpr int kAhead = 4;  // loads in flight: 16 KB a block, what a pass needs to hide their latency
  for (int first = threadIdx.x; first < row.vocabulary; first += kAhead * kThreads) {
    float logits[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      const int id = first + j * kThreads;
      logits[j] = id < row.vocabulary ? row.logits[id] : -infinity();
    }
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      const float l = logits[j], x = exponent_of(row, l);
      const int id = first + j * kThreads;
      if (bin_of(x) != group.bin || l < row.last || rank_of(l, id) >> group.shift != group.prefix) continue;
      const u64 weight = weight_of(x);
      if (weight) use(l, id, weight);
    }
  }
}

// Divides a group by the next 11 bits of the rank, those above `digit`.
CALLED void divide(Shared* shared, Row row, Group group, int digit) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared->counts[i] = 0, shared->weights[i] = 0;
  __syncthreads();
  for_each(row, group, [&](float l, int id, u64 weight) {
    const int bin = (int)((rank_of(l, id) >> digit) % kBins);
    atomicAdd(shared->counts + bin, 1u);
    // Shared memory adds only 32 bits at a time.
    u32* halves = (u32*)(shared->weights + bin);
    const u32 low = (u32)weight, carry = atomicAdd(halves, low) > ~low, high = (u32)(weight >> 32) + carry;
    if (high) atomicAdd(halves + 1, high);
  });
  __syncthreads();
}

// The first of the histogram's first n bins at which the running sum, of counts or of weights, passes `target`.
CALLED Found find_bin(Shared* shared, int n, bool ones, u64 target) {
  return find(shared, n, [&](int i) {
    return ones ? shared->counts[i] : shared->weights[i];
  }, [&](u64) { return target; });
}

// Writes to shared->last the last token that a filter keeps: the first of the ranking at which the running sum, of ones
// or of weights, passes a target. `found` is its bin in the histogram.
DEVICE void cut(Shared* shared, const Row& row, Found found, bool ones) {
  u64 before = ones ? find_bin(shared, found.index, false, kOff).total : 0;
  Group group = {found.index, 48, 0};
  while (shared->counts[found.index] > kList) {  // ends: at most 16 tokens agree from bit 4 on
    __syncthreads();
    divide(shared, row, group, group.shift - 11);
    found = find_bin(shared, kBins, ones, found.rest);
    if (ones) before += find_bin(shared, found.index, false, kOff).total;
    group.shift -= 11;
    group.prefix = group.prefix << 11 | (u32)found.index;
  }
  if (threadIdx.x == 0) shared->listed = 0;
  __syncthreads();
  for_each(row, group, [&](float l, int id, u64 weight) {
    shared->list[atomicAdd(&shared->listed, 1u)] = {l, id, weight};
  });
  __syncthreads();
  const int listed = (int)shared->listed;
  if ((int)threadIdx.x < listed) {
    const Candidate mine = shared->list[threadIdx.x];
    u64 ahead = 0, count = 0;
    for (int i = 0; i < listed; i++) {
      const Candidate other = shared->list[i];
      if (other.logit > mine.logit || (other.logit == mine.logit && other.id < mine.id)) {
        ahead += other.weight;
        count++;
      }
    }
    const u64 sum = ones ? count : ahead;
    if (sum <= found.rest && found.rest < sum + (ones ? 1 : mine.weight))
      shared->last = {mine.logit, mine.id, before + ahead + mine.weight};
  }
  __syncthreads();
}

// Ops.sample over logits as shape left them → results int32: ids and, `faults` places on, whether a row had no token to
// draw (its id is then 0): it holds a NaN or +inf, or only -inf. Rows add their tokens to the table.
KERNEL(1024) draw(const float* logits, const Settings* settings, const u64* largest, const u64* sums,
                  const u32* counts, const u64* weights, int chunks, u32* table, const int* resolved, int* results,
                  int faults, int vocabulary) {
  wait_for_previous_kernel();
  Shared* shared = (Shared*)shared_memory();
  const Settings& s = settings[blockIdx.x];
  if (threadIdx.x == 0 && s.table) {
    for (int k = 0; k < s.commits; k++) table[(i64)(s.table - 1) * vocabulary + resolved[s.tail + k]]++;
  }
  const u64 best = best_of(largest, blockIdx.x, chunks);
  Row row = row_of(logits, s, best, blockIdx.x, vocabulary);
  int token = has_token(row) ? (int)~(u32)best : 0;
  if (has_token(row) && s.inverse > 0) {
    // Up to 64 chunks: a lane has two consecutive ones.
    const int pair = threadIdx.x % 32 * 2;
    const u64 first = pair < chunks ? sums[blockIdx.x * chunks + pair] : 0;
    const u64 second = pair + 1 < chunks ? sums[blockIdx.x * chunks + pair + 1] : 0;
    u64 all = warp_total(first + second), target = __umul64hi(s.uniform, all);
    int begin = 0, end = vocabulary;
    const bool is_whole = !is_cut(s, vocabulary);
    if (is_whole) {
      const int lane = pick(first + second, target);
      const u64 half = __shfl_sync(0xffffffffu, first, lane);
      begin = (2 * lane + (target >= half)) * kChunk;
      end = min(vocabulary, begin + kChunk);
      if (target >= half) target -= half;
    }
    const bool by_rank = s.top_k > 0 && s.top_k < vocabulary, by_weight = s.top_p != kOff;
    bool kept_all = true;
    for (int ones = by_rank; ones >= (by_weight ? 0 : 1); ones--) {
      for (int i = threadIdx.x; i < kBins; i += kThreads) {
        shared->counts[i] = counts[blockIdx.x * kBins + i];
        shared->weights[i] = weights[blockIdx.x * kBins + i];
      }
      __syncthreads();
      u64 sought = (u64)s.top_k - 1;
      if (!ones) {
        // Tokens are kept while the sum before them is below top_p * all: the last is the first whose running sum
        // passes that product, rounded up, less 1.
        const u64 floor = __umul64hi(s.top_p, all), fraction = s.top_p * all;
        sought = fraction || !floor ? floor : floor - 1;
      }
      const Found found = find_bin(shared, kBins, ones, sought);
      if (found.index < 0) continue;  // fewer than top_k are left
      cut(shared, row, found, ones);
      kept_all = false;
      all = shared->last.weight;
    }
    if (!kept_all) {
      row.last = shared->last.logit;
      row.last_id = shared->last.id;
    }
    token = begin + find(shared, end - begin, [&](int i) {
      const float l = row.logits[begin + i];
      return keeps(row, l, begin + i) ? weight_of(exponent_of(row, l)) : 0;
    }, [&](u64 total) { return is_whole ? target : __umul64hi(s.uniform, total); }).index;
  }
  if (threadIdx.x == 0) {
    results[blockIdx.x] = token;
    results[faults + blockIdx.x] = !has_token(row);
  }
}
