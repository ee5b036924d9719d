// The interface between the kernels, their callers and Python (library.py). Plain C layout.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

// Exported, so that Python finds it by name.
#define STARLING_API extern "C" __attribute__((visibility("default")))

constexpr int kBlockRows = 16;         // output rows in a block of weights
constexpr int kStripeBlocks = 16;      // blocks whose panels are stored together
constexpr int kPanelColumns = 1024;    // input features in a panel
constexpr int kMaxTokens = 512;        // activation rows that one pass over the weights serves
constexpr int kKvSplit = 256;          // positions that attention sums up before merging: aligned to absolute multiples
constexpr int kMaxHeadDim = 256;
constexpr int kAttentionRows = 64;     // query rows (tokens times heads of one key/value head) in one item, at most

enum Precision : int32_t { kFloat32 = 0, kInt16 = 1, kInt8 = 2, kAuto = 3 };

// One linear layer. Rows are output features, cut into blocks of 16 (the last one padded with zero scales); columns
// are input features, cut into groups that share a scale and a zero point. A group of a block is the unit of storage:
//   bits 4:  weight [group / 8][16 rows][4 bytes]: byte j holds column 8c + j in its low nibble and column 8c + 4 + j
//            in its high one; scales fp16 [16]; zeros [8], two to a byte.
//   bits 8:  weight [group / 4][16 rows][4 columns], stored + 128; scales as above; no zeros.
//   bits 16: weight fp16 [group][16 rows]; no scales, no zeros.
// Units are stored in the order in which a step of few tokens reads them: stripes of 16 blocks; in a stripe, panels of
// 1,024 columns; in a panel, blocks; in a block, groups. So memory is read sequentially, while the panel's activations
// stay in L1.
struct Linear {
  const uint8_t* weight;
  const uint16_t* scales;
  const uint8_t* zeros;
  int64_t rows;
  int64_t columns;
  int64_t group;
  int64_t bits;
};

// The index, among all units, of block b's unit of group g. Static: each instruction set keeps its own copy.
static inline int64_t unit_index(int64_t blocks, int64_t groups, int64_t group, int64_t b, int64_t g) {
  const int64_t per_panel = kPanelColumns / group, panel = g / per_panel, stripe = b / kStripeBlocks;
  const int64_t stripe_first = stripe * kStripeBlocks, panel_first = panel * per_panel;
  const int64_t stripe_blocks = blocks - stripe_first < kStripeBlocks ? blocks - stripe_first : kStripeBlocks;
  const int64_t panel_groups = groups - panel_first < per_panel ? groups - panel_first : per_panel;
  return stripe_first * groups + panel_first * stripe_blocks + (b - stripe_first) * panel_groups + (g - panel_first);
}

// How many of `rows` activation rows, of `planes` planes each, the next tile takes, if a kernel takes `max_planes`.
constexpr int rows_of_tile(int rows, int planes, int max_planes) {
  return rows >= max_planes / planes ? max_planes / planes : rows <= 8 ? rows : rows / 4 * 4;
}

// Neighbouring packed rows of activations that one kernel call takes together.
struct Tile {
  int32_t first;   // its first packed row
  int32_t rows;
  int32_t planes;  // 1: int8; 2: int16 as 256 * high + low, two int8 planes
  int32_t run;     // columns of a plane that lie together, a power of 2: 4, or what a matrix unit reads
  int64_t offset;  // bytes before it in `planes`
};

// Activation rows, quantized group by group and laid out in the order in which the kernels read them.
struct Activations {
  int32_t rows;
  int32_t tiles;
  const float* x;         // [rows, columns], as given
  const int32_t* order;   // [rows]: packed row → row of x and y
  const Tile* tile;
  int8_t* planes;         // per tile: [columns / run][rows * planes][run]
  float* scales;          // per tile: [groups][rows]
  int32_t* minus_sums;    // per tile: [groups][rows * planes]: minus the plane's sum, as int16 in the low half
  int64_t columns;
  int64_t group;
};

// Keys and values of one layer and the step's tokens; see Ops.attention.
struct Attention {
  const float* q;                // [tokens][heads][dim]
  const void* keys;              // [blocks][kv_heads][block_size][dim]
  const void* values;
  float* out;                    // [tokens][heads][dim]
  const int32_t* query_starts;   // [requests + 1]
  const int32_t* context_lens;   // [requests]
  const int32_t* block_tables;   // [requests][table_stride]
  int64_t table_stride;
  int64_t requests;
  int64_t heads, kv_heads, dim, block_size;
  int64_t window;                // 0: none
  int64_t half;                  // 1: the cache is fp16; 0: float32
};

// Some query tokens of one request and one key/value head, over some splits of the positions.
struct AttentionItem {
  int32_t request, first_token, tokens, kv_head;
  int32_t first_split, last_split;  // [first, last)
  float* partial;                   // null: finish and write `out`; else [rows][dim + 2]: sums, then max and total
};

struct RotaryWrite {
  const float* qkv;         // [tokens][q_size + 2 * kv_size]
  const int32_t* positions;
  const int32_t* slots;
  const float* rotary;      // [max_positions][dim]
  void* keys;
  void* values;
  float* q;                 // [tokens][q_size]
  int64_t heads, kv_heads, dim, block_size, half;
};

// One step's tokens; see Batch.
struct Step {
  int64_t tokens, requests, table_stride, rows;
  const int32_t* positions;
  const int32_t* slots;
  const int32_t* query_starts;
  const int32_t* context_lens;
  const int32_t* block_tables;
  const uint8_t* prompt_tokens;
  const int64_t* logit_rows;  // [rows]
};

// Shapes of a decoder and of its cache.
struct Shape {
  int64_t hidden, intermediate, heads, kv_heads, dim;
  int64_t window;      // 0: none
  int64_t block_size;
  int64_t half;        // 1: the cache is fp16; 0: float32
  float eps;
};

struct Layer {
  const uint16_t* input_norm;
  const Linear* qkv;
  const Linear* out;
  const uint16_t* post_attention_norm;
  const Linear* gate_up;
  const Linear* down;
  void* keys;
  void* values;
};

// The kernels of one instruction set.
struct Kernels {
  int32_t planes;         // int8 planes in the widest tile
  int32_t matrix_planes;  // the same for the matrix unit, which takes steps of more than `planes`; 0: no unit
  int32_t matrix_blocks;  // blocks of weights that it multiplies by a tile together
  int32_t matrix_run;     // columns of a plane that it reads together; half as many where a group is no multiple
  int64_t tile_bytes;  // of activations that stay in L2 while blocks of weights stream past
  void (*quantize)(const Activations*, int tile, int64_t first_group, int64_t last_group);
  // Blocks [first, last), all in one stripe, times tiles [first, last); in float32, times all rows.
  void (*linear)(const Linear*, const Activations*, Precision, float* y, int64_t first_block, int64_t last_block,
                 int first_tile, int last_tile);
  void (*attention)(const Attention*, const AttentionItem*);
  void (*merge)(const Attention*, const AttentionItem* splits, int count);
  void (*rotate_and_write)(const RotaryWrite*, int64_t first_token, int64_t last_token);
  void (*add_norm)(const float* x, float* residual, const uint16_t* weight, float* out, int64_t hidden, float eps);
  void (*silu_mul)(const float* gate, const float* up, float* out, int64_t count);
  void (*widen)(const uint16_t* half, float* out, int64_t count);
  void (*exp_scaled)(const float* x, float shift, float scale, float* out, int64_t count);
};

// What kernels.cpp is compiled to: once per instruction set, each in a library of its own.
STARLING_API const Kernels starling_kernels;
