// Rotary embedding of queries and keys, and the write of keys and values to the paged cache, in one launch.
//
// A token of Starling moves 12 KiB in and 12 KiB out: at batch 1 two dependent reads (position and slot; angles) and a
// write, about 1.5 us of latency. In steps of few tokens or of decodes, attention does it.
#include "rotary.h"

// qkv fp16 [tokens][heads + 2 kv_heads][dim] → q [tokens][heads][dim] rotated, keys (rotated) and values at `slots` of
// [blocks][kv_heads][block_size][dim]. rotary float32 [positions][dim]: dim / 2 cosines, then sines; element i pairs
// with i + dim / 2. A slot below 0 marks a padding token, for which nothing is read or written.
//
// A thread rotates 8 pairs, or copies 16 elements of a value: dim / 16 threads a head.
KERNEL(128) rotate_and_cache(const half_t* qkv, const int* positions, const int* slots, const float* rotary,
                             half_t* q, half_t* keys, half_t* values, int tokens, int heads, int kv_heads, int dim,
                             int block_size) {
  wait_for_previous_kernel();
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
  half_t* cache = head < heads + kv_heads ? keys : values;
  half_t* to = head < heads ? q + ((i64)token * heads + head) * dim + i : cache + cached;
  const uint4 a = *(const uint4*)from, b = *(const uint4*)(from + dim / 2);
  if (head >= heads + kv_heads) {
    *(uint4*)to = a;
    *(uint4*)(to + dim / 2) = b;
    return;
  }
  const float* cos = rotary + (i64)position * dim + i;
  const float* sin = cos + dim / 2;
  // Compute both before storing either: as far as the compiler knows, a store could change the angles.
  const uint4 first = turn(a, b, cos, sin, false), second = turn(b, a, cos, sin, true);
  *(uint4*)to = first;
  *(uint4*)(to + dim / 2) = second;
}
