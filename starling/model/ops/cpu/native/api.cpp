// The C interface that library.py calls. Pointers stay the caller's; only the context outlives a call.
#include <system_error>

#include "context.h"

// Null if so many threads cannot be started.
STARLING_API Context* starling_open(int threads, const Kernels* kernels) {
  try {
    return new Context(threads, kernels);
  } catch (const std::system_error&) {
    return nullptr;
  }
}

STARLING_API void starling_close(Context* context) { delete context; }

STARLING_API void starling_linear(Context* context, const Linear* w, const float* x, int64_t tokens,
                                  const uint8_t* prompt_tokens, int precision, float* y) {
  context->linear(*w, x, tokens, prompt_tokens, (Precision)precision, y);
}

STARLING_API void starling_add_norm(Context* context, const float* x, float* residual, const uint16_t* weight,
                                    float* out, int64_t tokens, int64_t hidden, float eps) {
  context->add_norm(x, residual, weight, out, tokens, hidden, eps);
}

STARLING_API void starling_rotate_and_write(Context* context, const Shape* shape, const Step* step, const float* qkv,
                                            const float* rotary, void* keys, void* values, float* q) {
  context->rotate_and_write(RotaryWrite{qkv, step->positions, step->slots, rotary, keys, values, q, shape->heads,
                                        shape->kv_heads, shape->dim, shape->block_size, shape->half},
                            step->tokens);
}

STARLING_API void starling_attention(Context* context, const Shape* shape, const Step* step, const float* q,
                                     const void* keys, const void* values, float* out) {
  context->attention(Attention{q, keys, values, out, step->query_starts, step->context_lens, step->block_tables,
                               step->table_stride, step->requests, shape->heads, shape->kv_heads, shape->dim,
                               shape->block_size, shape->window, shape->half});
}

STARLING_API void starling_silu_mul(Context* context, const float* gate_up, float* out, int64_t tokens,
                                    int64_t intermediate) {
  context->silu_mul(gate_up, out, tokens, intermediate);
}

STARLING_API void starling_embed(Context* context, const int64_t* ids, const uint16_t* table, float* out,
                                 int64_t tokens, int64_t hidden) {
  context->embed(ids, table, out, tokens, hidden);
}

STARLING_API void starling_sample(Context* context, const float* logits, int64_t tokens, int64_t vocabulary,
                                  const double* temperature, const int64_t* top_k, const double* top_p,
                                  const double* min_p, const double* uniform, int64_t* ids) {
  context->sample(logits, tokens, vocabulary, temperature, top_k, top_p, min_p, uniform, ids);
}

STARLING_API void starling_layers(Context* context, const Layer* layers, int64_t count, const Shape* shape,
                                  const Step* step, const float* rotary, int precision, float* x, float* residual) {
  context->layers(layers, count, *shape, *step, rotary, (Precision)precision, x, residual);
}

STARLING_API void starling_pack_awq(Context* context, const uint32_t* qweight, const uint32_t* qzeros,
                                    const uint16_t* scales, const Linear* out) {
  context->pack_awq(qweight, qzeros, scales, *out);
}

STARLING_API void starling_pack_half(Context* context, const uint16_t* matrix, const Linear* out) {
  context->pack_half(matrix, *out);
}
