// Rotary embedding of queries and keys, and the writing of keys and values to the paged cache, in one launch.
//
// A token of Starling moves 12 KiB in and 12 KiB out; at batch 1 it is three dependent reads (position and slot, angles,
// values) and a write, about 2 us of latency, over as many blocks as there are 128 pieces of work.
#include "device.h"

// qkv fp16 [tokens][heads + 2 kv_heads][dim] → q [tokens][heads][dim] rotated, keys (rotated) and values at `slots` of
// [blocks][kv_heads][block_size][dim]. rotary float32 [positions][dim]: dim / 2 cosines, then sines; element i pairs with
// i + dim / 2. A slot below 0 is a padding token's: nothing of it is read or written.
//
// A thread turns 8 pairs, or copies 16 elements of a value: dim / 16 threads a head.
KERNEL(128) rotate_and_cache(const half_t* qkv, const int* positions, const int* slots, const float* rotary,
                             half_t* q, half_t* keys, half_t* values, int tokens, int heads, int kv_heads, int dim,
                             int block_size) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  const int pieces = dim / 16, all_heads = heads + 2 * kv_heads;
  const int token = index / (all_heads * pieces);
  if (token >= tokens) return;
  const int slot = slots[token], position = positions[token];
  if (slot < 0) return;
  const int head = index / pieces % all_heads, i = index % pieces * 8;
  const half_t* from = qkv + ((i64)token * all_heads + head) * dim + i;
  const int cached_head = head < heads ? 0 : (head - heads) % kv_heads;
  const i64 cached = (((i64)(slot / block_size) * kv_heads + cached_head) * block_size + slot % block_size) * dim + i;
  half_t* to = head < heads ? q + ((i64)token * heads + head) * dim + i : (head < heads + kv_heads ? keys : values) + cached;
  const uint4 a = *(const uint4*)from, b = *(const uint4*)(from + dim / 2);
  if (head >= heads + kv_heads) {
    *(uint4*)to = a;
    *(uint4*)(to + dim / 2) = b;
    return;
  }
  const float* angles = rotary + (i64)position * dim + i;
  const u32 first[4] = {a.x, a.y, a.z, a.w}, second[4] = {b.x, b.y, b.z, b.w};
  u32 turned[2][4];
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const float4 cos = *(const float4*)(angles + 2 * j), sin = *(const float4*)(angles + dim / 2 + 2 * j);
    const float c[4] = {cos.x, cos.y, cos.z, cos.w}, s[4] = {sin.x, sin.y, sin.z, sin.w};
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float x0 = low_half(first[j + h]), x1 = high_half(first[j + h]);
      const float y0 = low_half(second[j + h]), y1 = high_half(second[j + h]);
      turned[0][j + h] = pack_halves(x0 * c[2 * h] - y0 * s[2 * h], x1 * c[2 * h + 1] - y1 * s[2 * h + 1]);
      turned[1][j + h] = pack_halves(y0 * c[2 * h] + x0 * s[2 * h], y1 * c[2 * h + 1] + x1 * s[2 * h + 1]);
    }
  }
  *(uint4*)to = make_uint4(turned[0][0], turned[0][1], turned[0][2], turned[0][3]);
  *(uint4*)(to + dim / 2) = make_uint4(turned[1][0], turned[1][1], turned[1][2], turned[1][3]);
}
