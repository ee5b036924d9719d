// Norms, rotary positions, SiLU, exp. Tails shorter than 16 are computed in a padded copy.
#pragma once

namespace {

// e^x to 1e-7 relative (Cephes' expf polynomial); 0 below -87.
inline F f_exp(F x) {
  const F clamped = f_min(f_max(x, f_set(-87.0f)), f_set(88.0f));
  const I n = i_from(f_mul(clamped, f_set(1.44269504088896341f)));
  const F nf = f_from(n);
  F r = f_fma(nf, f_set(-0.693359375f), clamped);
  r = f_fma(nf, f_set(2.12194440e-4f), r);
  F p = f_set(1.9875691500e-4f);
  p = f_fma(p, r, f_set(1.3981999507e-3f));
  p = f_fma(p, r, f_set(8.3334519073e-3f));
  p = f_fma(p, r, f_set(4.1665795894e-2f));
  p = f_fma(p, r, f_set(1.6666665459e-1f));
  p = f_fma(p, r, f_set(5.0000001201e-1f));
  p = f_add(f_fma(f_mul(r, r), p, r), f_set(1.0f));
  return f_zero_below(x, -87.0f, f_mul(p, f_bits(i_left<23>(i_add(n, i_set(127))))));
}

inline F load_some(const float* p, int64_t count) {
  if (count >= 16) return f_load(p);
  float padded[16] = {};
  memcpy(padded, p, count * sizeof(float));
  return f_load(padded);
}
inline F load_some(const uint16_t* p, int64_t count) {
  if (count >= 16) return f_load_half(p);
  uint16_t padded[16] = {};
  memcpy(padded, p, count * sizeof(uint16_t));
  return f_load_half(padded);
}
inline void store_some(float* p, F x, int64_t count) {
  if (count >= 16) return f_store(p, x);
  float padded[16];
  f_store(padded, x);
  memcpy(p, padded, count * sizeof(float));
}
inline void store_some(uint16_t* p, F x, int64_t count) {
  if (count >= 16) return f_store_half(p, x);
  uint16_t padded[16];
  f_store_half(padded, x);
  memcpy(p, padded, count * sizeof(uint16_t));
}

// residual += x (unless x is null); out = residual / sqrt(mean(residual²) + eps) * weight.
void add_norm(const float* x, float* residual, const uint16_t* weight, float* out, int64_t hidden, float eps) {
  F squares[4] = {f_zero(), f_zero(), f_zero(), f_zero()};
  for (int64_t i = 0; i < hidden; i += 16) {
    F value = load_some(residual + i, hidden - i);
    if (x) {
      value = f_add(load_some(x + i, hidden - i), value);
      store_some(residual + i, value, hidden - i);
    }
    F& sum = squares[i / 16 % 4];
    sum = f_fma(value, value, sum);
  }
  const float total = f_sum(f_add(f_add(squares[0], squares[1]), f_add(squares[2], squares[3])));
  const F scale = f_set(1.0f / __builtin_sqrtf(total / (float)hidden + eps));
  for (int64_t i = 0; i < hidden; i += 16) {
    const F normed = f_mul(load_some(residual + i, hidden - i), scale);
    store_some(out + i, f_mul(load_some(weight + i, hidden - i), normed), hidden - i);
  }
}

void silu_mul(const float* gate, const float* up, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const F g = load_some(gate + i, count - i);
    const F silu = f_div(g, f_add(f_set(1.0f), f_exp(f_sub(f_zero(), g))));
    store_some(out + i, f_mul(silu, load_some(up + i, count - i)), count - i);
  }
}

void widen(const uint16_t* half, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) store_some(out + i, load_some(half + i, count - i), count - i);
}

// out = e^((x - shift) * scale)
void exp_scaled(const float* x, float shift, float scale, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const F value = f_mul(f_sub(load_some(x + i, count - i), f_set(shift)), f_set(scale));
    store_some(out + i, f_exp(value), count - i);
  }
}

template <class T> void rotate(const float* x, const float* rotary, T* out, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t left = half - i;
    const F first = load_some(x + i, left), second = load_some(x + half + i, left);
    const F cos = load_some(rotary + i, left), sin = load_some(rotary + half + i, left);
    store_some(out + i, f_sub(f_mul(first, cos), f_mul(second, sin)), left);
    store_some(out + half + i, f_add(f_mul(second, cos), f_mul(first, sin)), left);
  }
}

template <class T> void rotate_and_write_as(const RotaryWrite* w, int64_t first, int64_t last) {
  const int64_t dim = w->dim, q_size = w->heads * dim, kv_size = w->kv_heads * dim;
  for (int64_t t = first; t < last; t++) {
    const float* qkv = w->qkv + t * (q_size + 2 * kv_size);
    const float* rotary = w->rotary + w->positions[t] * dim;
    for (int64_t h = 0; h < w->heads; h++) rotate(qkv + h * dim, rotary, w->q + t * q_size + h * dim, dim);
    const int64_t block = w->slots[t] / w->block_size, offset = w->slots[t] % w->block_size;
    for (int64_t h = 0; h < w->kv_heads; h++) {
      const int64_t at = ((block * w->kv_heads + h) * w->block_size + offset) * dim;
      rotate(qkv + q_size + h * dim, rotary, (T*)w->keys + at, dim);
      const float* v = qkv + q_size + kv_size + h * dim;
      for (int64_t i = 0; i < dim; i += 16) store_some((T*)w->values + at + i, load_some(v + i, dim - i), dim - i);
    }
  }
}

void rotate_and_write(const RotaryWrite* w, int64_t first, int64_t last) {
  if (w->half) rotate_and_write_as<uint16_t>(w, first, last);
  else rotate_and_write_as<float>(w, first, last);
}

}  // namespace
