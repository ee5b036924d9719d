// The kernels of one instruction set, named by the argument, against plain loops in double precision. scripts/sanitize
// runs this under the sanitizers, and it can run where there is no Python (another architecture, an emulator).
// Buffers are exactly as large as the interface says, so that a read beyond one is found.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "context.h"
#include "isa.h"
#include "sampling.h"

static std::mt19937 rng;
static int failures = 0;

static double uniform() { return std::uniform_real_distribution<double>(-1, 1)(rng); }
static int below(int n) { return (int)(rng() % (unsigned)n); }

static uint16_t half(double x) {  // a normal fp16 near x
  if (std::fabs(x) < 1e-4) return 0;
  int exponent;
  double fraction = std::frexp(std::fabs(x), &exponent);
  return (uint16_t)((x < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | (int)((fraction * 2 - 1) * 1024));
}
static double of_half(uint16_t h) {
  if (!(h & 0x7fff)) return 0;
  return (h & 0x8000 ? -1 : 1) * std::ldexp(1 + (h & 1023) / 1024.0, (h >> 10 & 31) - 15);
}

// `size`: the expected sum of squares; by default that of `wanted`, which may be small by chance if numbers are few.
static void check(const std::string& what, const std::vector<float>& found, const std::vector<double>& wanted,
                  double allowed, double size = 0) {
  double difference = 0;
  const bool measure = size == 0;
  for (size_t i = 0; i < wanted.size(); i++) {
    difference += (found[i] - wanted[i]) * (found[i] - wanted[i]);
    if (measure) size += wanted[i] * wanted[i];
  }
  const double error = std::sqrt(difference / (size + 1e-30));
  if (!(error <= allowed)) {
    failures++;
    std::printf("FAILED %s: relative error %g, allowed %g\n", what.c_str(), error, allowed);
  }
}

struct Weight {  // packed, and what it means
  std::vector<uint8_t> weight, zeros;
  std::vector<uint16_t> scales;
  Linear linear;
  std::vector<double> matrix;  // [rows][columns]
};

static void describe(Weight& w, int64_t rows, int64_t columns, int64_t group, int64_t bits) {
  const int64_t blocks = (rows + 15) / 16, groups = columns / group;
  w.weight.resize(blocks * columns * 2 * bits);
  if (bits < 16) w.scales.resize(blocks * groups * 16);
  if (bits == 4) w.zeros.resize(blocks * groups * 8);
  w.linear = Linear{w.weight.data(), bits < 16 ? w.scales.data() : nullptr, bits == 4 ? w.zeros.data() : nullptr,
                    rows, columns, group, bits};
  w.matrix.resize(rows * columns);
}

static void make_awq(Context& context, Weight& w, int64_t rows, int64_t columns, int64_t group) {
  static const int kNibbleOfColumn[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  describe(w, rows, columns, group, 4);
  std::vector<uint32_t> qweight(columns * rows / 8), qzeros(columns / group * rows / 8);
  std::vector<uint16_t> scales(columns / group * rows);
  for (auto& word : qweight) word = (uint32_t)rng();
  for (auto& word : qzeros) word = (uint32_t)rng();
  for (auto& scale : scales) scale = half(0.01 + 0.005 * uniform());
  auto nibble = [&](const std::vector<uint32_t>& words, int64_t row, int64_t n) {
    return (int)(words[row * (rows / 8) + n / 8] >> (4 * kNibbleOfColumn[n % 8]) & 15);
  };
  for (int64_t n = 0; n < rows; n++)
    for (int64_t k = 0; k < columns; k++)
      w.matrix[n * columns + k] =
          (nibble(qweight, k, n) - nibble(qzeros, k / group, n)) * of_half(scales[k / group * rows + n]);
  context.pack_awq(qweight.data(), qzeros.data(), scales.data(), w.linear);
}

static void make_head(Context& context, Weight& w, int64_t rows, int64_t columns, int64_t bits) {
  describe(w, rows, columns, 32, bits);
  std::vector<uint16_t> matrix(rows * columns);
  for (auto& x : matrix) x = half(uniform());
  for (size_t i = 0; i < matrix.size(); i++) w.matrix[i] = of_half(matrix[i]);
  context.pack_half(matrix.data(), w.linear);
}

static void test_linear(Context& context, Context& alone, const std::string& name, const Weight& w) {
  const int64_t columns = w.linear.columns, rows = w.linear.rows;
  for (int tokens : {1, 2, 3, 5 + below(30), 513 + below(20)}) {
    std::vector<float> x(tokens * columns), y(tokens * rows);
    std::vector<double> wanted(tokens * rows);
    std::vector<uint8_t> prompt(tokens);
    for (auto& value : x) value = (float)(uniform() * 3);
    for (auto& flag : prompt) flag = (uint8_t)below(2);
    double squares = 0;
    for (int t = 0; t < tokens; t++)
      for (int64_t n = 0; n < rows; n++)
        for (int64_t k = 0; k < columns; k++) {
          const double product = x[t * columns + k] * w.matrix[n * columns + k];
          wanted[t * rows + n] += product;
          squares += product * product;
        }
    for (Precision precision : {kFloat32, kInt16, kInt8, kAuto}) {
      const std::string what = name + " linear of " + std::to_string(w.linear.bits) + " bits, " +
                               std::to_string(tokens) + " tokens, precision " + std::to_string(precision);
      if (w.linear.bits == 8 && precision == kFloat32) continue;
      context.linear(w.linear, x.data(), tokens, prompt.data(), precision, y.data());
      const bool coarse = precision >= kInt8 || w.linear.bits == 8;
      check(what, y, wanted, coarse ? 2e-2 : precision == kInt16 ? 1e-4 : 2e-6, squares);
      const int t = below(tokens);
      std::vector<float> one(rows);
      alone.linear(w.linear, &x[t * columns], 1, &prompt[t], precision, one.data());
      if (memcmp(one.data(), &y[t * rows], rows * sizeof(float))) {
        failures++;
        std::printf("FAILED %s: row %d differs alone\n", what.c_str(), t);
      }
    }
  }
}

static void test_attention(Context& context, const std::string& name, bool as_half, int64_t window) {
  const int64_t dims[] = {128, 24, 80}, dim = dims[below(3)];
  const int64_t kv_heads = 1 + below(3), heads = kv_heads * (1 + below(5));
  const int64_t block_size = 16, blocks = 40, length = 300 + below(300), queries = 1 + below(40);
  const int64_t q_size = heads * dim, kv_size = kv_heads * dim, first = length - queries;
  const size_t item = as_half ? 2 : 4;
  std::vector<uint8_t> keys(blocks * kv_size * block_size * item), values(keys.size());
  std::vector<double> k(length * kv_size), v(length * kv_size), q(queries * q_size);
  std::vector<int32_t> table(blocks), positions, slots, starts = {0, (int32_t)queries}, contexts = {(int32_t)length};
  for (int i = 0; i < blocks; i++) table[i] = i;
  std::shuffle(table.begin(), table.end(), rng);
  auto slot = [&](int64_t p) { return table[p / block_size] * block_size + p % block_size; };
  std::vector<float> rotary(length * dim), qkv(queries * (q_size + 2 * kv_size)), out(queries * q_size);
  for (auto& x : rotary) x = (float)uniform();
  for (auto& x : qkv) x = (float)of_half(half(uniform()));
  auto put = [&](std::vector<uint8_t>& cache, std::vector<double>& plain, int64_t p, int64_t h, int64_t d) {
    const uint16_t bits = half(uniform());
    const float number = (float)of_half(bits);
    const int64_t at = (((slot(p) / block_size) * kv_heads + h) * block_size + slot(p) % block_size) * dim + d;
    memcpy(&cache[at * item], as_half ? (const void*)&bits : (const void*)&number, item);
    plain[(p * kv_heads + h) * dim + d] = number;
  };
  for (int64_t p = 0; p < first; p++)
    for (int64_t h = 0; h < kv_heads; h++)
      for (int64_t d = 0; d < dim; d++) put(keys, k, p, h, d), put(values, v, p, h, d);
  for (int64_t t = 0; t < queries; t++) {
    positions.push_back((int32_t)(first + t));
    slots.push_back((int32_t)slot(first + t));
    const float* row = &qkv[t * (q_size + 2 * kv_size)];
    for (int64_t h = 0; h < heads + kv_heads; h++)
      for (int64_t d = 0; d < dim; d++) {
        const int64_t pair = d < dim / 2 ? d + dim / 2 : d - dim / 2, f = d % (dim / 2);
        const double cos = rotary[(first + t) * dim + f], sin = rotary[(first + t) * dim + dim / 2 + f];
        const double turned = row[h * dim + d] * cos + (d < dim / 2 ? -1 : 1) * row[h * dim + pair] * sin;
        if (h < heads) q[t * q_size + h * dim + d] = turned;
        else k[((first + t) * kv_heads + h - heads) * dim + d] = turned;
      }
    for (int64_t i = 0; i < kv_size; i++) v[(first + t) * kv_size + i] = row[q_size + kv_size + i];
  }
  std::vector<float> turned(queries * q_size);
  context.rotate_and_write(RotaryWrite{qkv.data(), positions.data(), slots.data(), rotary.data(), keys.data(),
                                       values.data(), turned.data(), heads, kv_heads, dim, block_size, as_half},
                           queries);
  check(name + " rotary", turned, q, 1e-6);
  context.attention(Attention{turned.data(), keys.data(), values.data(), out.data(), starts.data(), contexts.data(),
                              table.data(), blocks, 1, heads, kv_heads, dim, block_size, window, as_half});
  std::vector<double> wanted(queries * q_size);
  for (int64_t t = 0; t < queries; t++)
    for (int64_t h = 0; h < heads; h++) {
      const int64_t last = first + t, low = window && last >= window ? last - window + 1 : 0;
      const int64_t kv = h / (heads / kv_heads);
      std::vector<double> weight;
      double largest = -1e30, total = 0;
      for (int64_t p = low; p <= last; p++) {
        double score = 0;
        for (int64_t d = 0; d < dim; d++) score += q[t * q_size + h * dim + d] * k[(p * kv_heads + kv) * dim + d];
        weight.push_back(score / std::sqrt((double)dim));
        largest = std::max(largest, weight.back());
      }
      for (double& w : weight) total += w = std::exp(w - largest);
      for (int64_t p = low; p <= last; p++)
        for (int64_t d = 0; d < dim; d++)
          wanted[t * q_size + h * dim + d] += weight[p - low] / total * v[(p * kv_heads + kv) * dim + d];
    }
  check(name + " attention, dim " + std::to_string(dim), out, wanted, as_half ? 1e-3 : 1e-5);
}

static void test_rows(Context& context, const std::string& name) {
  const int64_t hidden = 1 + below(300), tokens = 1 + below(9);
  std::vector<float> x(tokens * hidden), residual(x.size()), out(x.size()), gate_up(tokens * 2 * hidden);
  std::vector<uint16_t> weight(hidden);
  std::vector<double> sum(x.size()), normed(x.size()), silu(x.size());
  for (auto& value : x) value = (float)uniform();
  for (auto& value : residual) value = (float)(uniform() * 9);
  for (auto& value : weight) value = half(uniform());
  for (auto& value : gate_up) value = (float)(uniform() * 100);
  for (int64_t t = 0; t < tokens; t++) {
    double squares = 0;
    for (int64_t i = t * hidden; i < (t + 1) * hidden; i++) squares += (sum[i] = (double)x[i] + residual[i]) * sum[i];
    for (int64_t i = 0; i < hidden; i++) {
      normed[t * hidden + i] = sum[t * hidden + i] / std::sqrt(squares / hidden + 1e-5) * of_half(weight[i]);
      const double gate = gate_up[t * 2 * hidden + i];
      silu[t * hidden + i] = gate / (1 + std::exp(-gate)) * gate_up[t * 2 * hidden + hidden + i];
    }
  }
  context.add_norm(x.data(), residual.data(), weight.data(), out.data(), tokens, hidden, 1e-5f);
  check(name + " residual", residual, sum, 1e-6);
  check(name + " norm", out, normed, 1e-6);
  context.silu_mul(gate_up.data(), out.data(), tokens, hidden);
  check(name + " silu", out, silu, 1e-6);
}

// NaN logits, from a broken model: any token may be drawn, but nothing out of bounds.
static void test_broken_draw(const std::string& name) {
  const float nan = std::nanf("");
  std::vector<float> p = {0.5f, nan, 1.0f, -nan, 0.25f};
  const int64_t drawn = draw(p.data(), (int64_t)p.size(), Sampling{2, 0.9, 0.0, 0.5});
  if (drawn >= 0 && drawn < (int64_t)p.size()) return;
  failures++;
  std::printf("FAILED %s: drew token %ld\n", name.c_str(), (long)drawn);
}

int main(int count, char** arguments) {
  if (count != 2) {
    std::printf("usage: %s INSTRUCTION_SET\n", arguments[0]);
    return 2;
  }
  const unsigned seed = std::random_device()();
  rng.seed(seed);
  const std::string name = arguments[1];
  std::printf("%s, seed %u\n", name.c_str(), seed);
  bool usable = name == "amx-emulated";
  for (int i = 0; starling_usable_isa(i); i++) usable |= name == starling_usable_isa(i);
  if (!usable) {
    std::printf("this machine lacks it\n");
    return 0;
  }
  Context context(3, &starling_kernels), alone(1, &starling_kernels);
  for (int round = 0; round < 2; round++) {
    Weight awq, head8, head16;
    const int64_t group = 32 << below(3);
    make_awq(context, awq, 8 * (1 + below(12)), group * (1 + below(4)), group);
    make_head(context, head8, 1 + below(50), 32 * (1 + below(5)), 8);
    make_head(context, head16, 1 + below(50), 32 * (1 + below(5)), 16);
    for (const Weight* w : {&awq, &head8, &head16}) test_linear(context, alone, name, *w);
    for (int64_t window : {0, 100})
      for (bool as_half : {true, false}) test_attention(context, name, as_half, window);
    test_rows(context, name);
    test_broken_draw(name);
  }
  std::printf(failures ? "%d failures\n" : "all good\n", failures);
  return failures != 0;
}
