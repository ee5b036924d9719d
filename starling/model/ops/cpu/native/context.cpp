#include "context.h"

#include <algorithm>
#include <limits>

#include "repack.h"
#include "sampling.h"

namespace {

constexpr int64_t kFewNumbers = 8192;  // quantized by one thread, in about the time that it takes to start many

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts rows of one precision into tiles: of any height for a matrix unit (run > 4), else of the kernels' heights.
void cut_tiles(int rows, int planes, int widest, int run, int64_t columns, std::vector<Tile>& tiles) {
  int first = tiles.empty() ? 0 : tiles.back().first + tiles.back().rows;
  int64_t offset = tiles.empty() ? 0 : tiles.back().offset + tiles.back().rows * tiles.back().planes * columns;
  while (rows > 0) {
    const int take = run == 4 ? rows_of_tile(rows, planes, widest) : std::min(rows, widest / planes);
    tiles.push_back(Tile{first, take, planes, run, offset});
    first += take;
    rows -= take;
    offset += take * planes * columns;
  }
}

}  // namespace

void Context::linear(const Linear& w, const float* x, int64_t tokens, const uint8_t* prompt_tokens,
                     Precision precision, float* y) {
  for (int64_t t = 0; t < tokens; t += kMaxTokens)
    pass(w, x + t * w.columns, std::min<int64_t>(kMaxTokens, tokens - t), prompt_tokens ? prompt_tokens + t : nullptr,
         precision, y + t * w.rows);
}

void Context::pass(const Linear& w, const float* x, int64_t tokens, const uint8_t* prompt_tokens, Precision precision,
                   float* y) {
  const bool floats = precision == kFloat32 || w.bits == 16;
  const int rows = (int)tokens;
  order_.resize(rows);
  const int64_t groups = w.columns / w.group;
  int64_t planes = 0;
  bool matrix = false;
  tiles_.clear();
  Activations a{};
  a.rows = rows;
  a.x = x;
  a.columns = w.columns;
  a.group = w.group;
  if (floats) {
    for (int i = 0; i < rows; i++) order_[i] = i;
  } else {
    auto coarse = [&](int i) {
      return precision == kInt8 || (precision == kAuto && prompt_tokens && prompt_tokens[i]);
    };
    int packed = 0;
    for (int i = 0; i < rows; i++)
      if (coarse(i)) order_[packed++] = i;
    const int coarse_rows = packed;
    for (int i = 0; i < rows; i++)
      if (!coarse(i)) order_[packed++] = i;
    planes = coarse_rows + 2 * (rows - coarse_rows);
    matrix = kernels_->matrix_planes && planes > kernels_->planes;
    const int widest = matrix ? kernels_->matrix_planes : kernels_->planes;
    const int run = !matrix ? 4 : w.group % kernels_->matrix_run ? kernels_->matrix_run / 2 : kernels_->matrix_run;
    cut_tiles(coarse_rows, 1, widest, run, w.columns, tiles_);
    cut_tiles(rows - coarse_rows, 2, widest, run, w.columns, tiles_);
    a.planes = planes_.get(planes * w.columns);
    a.minus_sums = minus_sums_.get(planes * groups);
    a.scales = scales_.get(rows * groups);
  }
  a.order = order_.data();
  a.tile = tiles_.data();
  a.tiles = (int32_t)tiles_.size();
  if (!floats) {
    // One panel of one tile at a time: a batch of 8 is only two tiles, too few to share.
    const int64_t step = kPanelColumns / w.group, panels = ceil_div(groups, step);
    auto panel = [&](int64_t i) {
      const int64_t first = i % panels * step;
      kernels_->quantize(&a, (int)(i / panels), first, std::min(groups, first + step));
    };
    if (rows * w.columns <= kFewNumbers)
      for (int64_t i = 0; i < a.tiles * panels; i++) panel(i);
    else
      pool_.run(a.tiles * panels, panel);
  }
  const int64_t blocks = ceil_div(w.rows, kBlockRows);
  // Chunks small enough to balance the load if a core is busy, large enough to stream: a stripe, or half, a quarter...
  // of one. Blocks that a matrix unit takes together stay together.
  const int64_t threads = pool_.threads(), min_chunk = matrix ? kernels_->matrix_blocks : 1;
  int64_t chunk = kStripeBlocks;
  while (chunk > min_chunk && chunk * 8 * threads > blocks) chunk /= 2;
  const int64_t chunks = ceil_div(blocks, chunk);
  // Many tiles are cut into parts that stay in L2, or smaller ones if the blocks alone make fewer than 8 chunks per
  // thread; but not below 4 tiles for that, since each part unpacks the weights anew.
  const int64_t in_l2 = ceil_div(planes * w.columns, kernels_->tile_bytes);
  const int64_t to_balance = std::min<int64_t>(ceil_div(8 * threads, chunks), a.tiles / 4);
  const int64_t parts = a.tiles < 2 ? 1 : std::min<int64_t>(a.tiles, std::max(in_l2, to_balance));
  pool_.run(chunks * parts, [&](int64_t i) {
    const int64_t first = i / parts * chunk, part = i % parts;
    kernels_->linear(&w, &a, precision, y, first, std::min(blocks, first + chunk), (int)(a.tiles * part / parts),
                     (int)(a.tiles * (part + 1) / parts));
  });
}

void Context::add_norm(const float* x, float* residual, const uint16_t* weight, float* out, int64_t tokens,
                       int64_t hidden, float eps) {
  auto row = [&](int64_t t) {
    kernels_->add_norm(x ? x + t * hidden : nullptr, residual + t * hidden, weight, out + t * hidden, hidden, eps);
  };
  if (tokens <= 4)
    for (int64_t t = 0; t < tokens; t++) row(t);
  else
    pool_.run(tokens, row);
}

void Context::rotate_and_write(const RotaryWrite& write, int64_t tokens) {
  if (tokens <= 4) return kernels_->rotate_and_write(&write, 0, tokens);
  pool_.run(tokens, [&](int64_t t) { kernels_->rotate_and_write(&write, t, t + 1); });
}

void Context::attention(const Attention& a) {
  const int64_t group = a.heads / a.kv_heads, max_tokens = std::max<int64_t>(1, kAttentionRows / group);
  int64_t total_splits = 0;
  items_.clear();
  for (int64_t r = 0; r < a.requests; r++) {
    const int64_t start = a.query_starts[r], end = a.query_starts[r + 1], first = a.context_lens[r] - (end - start);
    for (int64_t t = start; t < end; t += max_tokens) {
      const int64_t tokens = std::min(max_tokens, end - t), earliest = first + t - start;
      const int64_t low = a.window ? std::max<int64_t>(0, earliest - a.window + 1) : 0;
      const int64_t first_split = low / kKvSplit, last_split = ceil_div(earliest + tokens, kKvSplit);
      total_splits += a.kv_heads * (last_split - first_split);
      for (int64_t h = 0; h < a.kv_heads; h++)
        items_.push_back(AttentionItem{(int32_t)r, (int32_t)t, (int32_t)tokens, (int32_t)h, (int32_t)first_split,
                                       (int32_t)last_split, nullptr});
    }
  }
  const int64_t whole = (int64_t)items_.size();
  if (whole >= 8 * pool_.threads() || whole == total_splits || pool_.threads() == 1) {
    // Later items see more positions: take them first.
    pool_.run(whole, [&](int64_t i) { kernels_->attention(&a, &items_[whole - 1 - i]); });
    return;
  }
  // Too few items to share: compute each split by itself, then merge them, with the same arithmetic.
  std::vector<int64_t> first_split(whole + 1, 0);
  std::vector<AttentionItem> splits;
  int64_t floats = 0;
  for (int64_t i = 0; i < whole; i++) {
    AttentionItem item = items_[i];
    for (int32_t s = items_[i].first_split; s < items_[i].last_split; s++) {
      item.first_split = s;
      item.last_split = s + 1;
      splits.push_back(item);
      floats += item.tokens * group * (a.dim + 2);
    }
    first_split[i + 1] = (int64_t)splits.size();
  }
  float* partial = partials_.get(floats);
  for (auto& item : splits) {
    item.partial = partial;
    partial += item.tokens * group * (a.dim + 2);
  }
  pool_.run((int64_t)splits.size(), [&](int64_t i) { kernels_->attention(&a, &splits[i]); });
  // Merging 17 splits of 256 tokens takes one thread 2.4 ms.
  pool_.run(whole, [&](int64_t i) {
    kernels_->merge(&a, &splits[first_split[i]], (int)(first_split[i + 1] - first_split[i]));
  });
}

void Context::silu_mul(const float* gate_up, float* out, int64_t tokens, int64_t intermediate) {
  const int64_t chunk = 4096, chunks = ceil_div(intermediate, chunk);
  pool_.run(tokens * chunks, [&](int64_t i) {
    const int64_t t = i / chunks, from = i % chunks * chunk;
    const float* gate = gate_up + t * 2 * intermediate + from;
    kernels_->silu_mul(gate, gate + intermediate, out + t * intermediate + from, std::min(chunk, intermediate - from));
  });
}

void Context::embed(const int64_t* ids, const uint16_t* table, float* out, int64_t tokens, int64_t hidden) {
  for (int64_t t = 0; t < tokens; t++) kernels_->widen(table + ids[t] * hidden, out + t * hidden, hidden);
}

void Context::sample(const float* logits, int64_t tokens, int64_t vocabulary, const double* temperature,
                     const int64_t* top_k, const double* top_p, const double* min_p, const double* uniform,
                     int64_t* ids) {
  float* probabilities = probabilities_.get(tokens * vocabulary);
  pool_.run(tokens, [&](int64_t t) {
    const float* row = logits + t * vocabulary;
    ids[t] = argmax(row, vocabulary);
    if (temperature[t] == 0) return;
    float* p = probabilities + t * vocabulary;
    // The inverse of a tiny temperature overflows float32, and 0 times infinity would be NaN.
    const float inverse = (float)std::min(1 / temperature[t], (double)std::numeric_limits<float>::max());
    kernels_->exp_scaled(row, row[ids[t]], inverse, p, vocabulary);
    ids[t] = draw(p, vocabulary, Sampling{top_k[t], top_p[t], min_p[t], uniform[t]});
  });
}

void Context::layers(const Layer* layers, int64_t count, const Shape& shape, const Step& step, const float* rotary,
                     Precision precision, float* x, float* residual) {
  int64_t tokens = step.tokens;
  const uint8_t* prompt_tokens = step.prompt_tokens;
  const int64_t hidden = shape.hidden;
  const int64_t q_size = shape.heads * shape.dim, kv_size = shape.kv_heads * shape.dim;
  float* normed = normed_.get(tokens * hidden);
  float* qkv = qkv_.get(tokens * (q_size + 2 * kv_size));
  float* q = q_.get(tokens * q_size);
  float* attended = attended_.get(tokens * q_size);
  float* gate_up = gate_up_.get(tokens * 2 * shape.intermediate);
  float* act = act_.get(tokens * shape.intermediate);
  memcpy(residual, x, tokens * hidden * sizeof(float));
  for (const Layer* layer = layers; layer < layers + count; layer++) {
    add_norm(layer == layers ? nullptr : x, residual, layer->input_norm, normed, tokens, hidden, shape.eps);
    linear(*layer->qkv, normed, tokens, prompt_tokens, precision, qkv);
    rotate_and_write(RotaryWrite{qkv, step.positions, step.slots, rotary, layer->keys, layer->values, q, shape.heads,
                                 shape.kv_heads, shape.dim, shape.block_size, shape.half},
                     tokens);
    attention(Attention{q, layer->keys, layer->values, attended, step.query_starts, step.context_lens,
                        step.block_tables, step.table_stride, step.requests, shape.heads, shape.kv_heads, shape.dim,
                        shape.block_size, shape.window, shape.half});
    if (layer == layers + count - 1) {  // from here on only the tokens whose logits are wanted matter
      tokens = step.rows;
      last_prompt_tokens_.resize(tokens);
      for (int64_t i = 0; i < tokens; i++) {  // ascending: a row only overwrites rows that have moved or are dropped
        const int64_t from = step.logit_rows[i];
        memmove(attended + i * q_size, attended + from * q_size, q_size * sizeof(float));
        memmove(residual + i * hidden, residual + from * hidden, hidden * sizeof(float));
        last_prompt_tokens_[i] = prompt_tokens[from];
      }
      prompt_tokens = last_prompt_tokens_.data();
    }
    linear(*layer->out, attended, tokens, prompt_tokens, precision, x);
    add_norm(x, residual, layer->post_attention_norm, normed, tokens, hidden, shape.eps);
    linear(*layer->gate_up, normed, tokens, prompt_tokens, precision, gate_up);
    silu_mul(gate_up, act, tokens, shape.intermediate);
    linear(*layer->down, act, tokens, prompt_tokens, precision, x);
  }
  for (int64_t i = 0; i < tokens * hidden; i++) residual[i] += x[i];
}

void Context::pack_awq(const uint32_t* qweight, const uint32_t* qzeros, const uint16_t* scales, const Linear& out) {
  const int64_t blocks = ceil_div(out.rows, kBlockRows), chunk = 8;  // 8 blocks read one cache line of AWQ words
  pool_.run(ceil_div(blocks, chunk), [&](int64_t i) {
    repack_awq(qweight, qzeros, scales, out.rows, out.columns, out.group, (uint8_t*)out.weight, (uint16_t*)out.scales,
               (uint8_t*)out.zeros, i * chunk, std::min(blocks, (i + 1) * chunk));
  });
}

void Context::pack_half(const uint16_t* matrix, const Linear& out) {
  const int64_t blocks = ceil_div(out.rows, kBlockRows), chunk = 8;
  pool_.run(ceil_div(blocks, chunk), [&](int64_t i) {
    const int64_t first = i * chunk, last = std::min(blocks, (i + 1) * chunk);
    if (out.bits == 8)
      repack_half_to_8(matrix, out.rows, out.columns, out.group, (uint8_t*)out.weight, (uint16_t*)out.scales, first,
                       last, kernels_);
    else
      repack_half(matrix, out.rows, out.columns, out.group, (uint16_t*)out.weight, first, last);
  });
}
