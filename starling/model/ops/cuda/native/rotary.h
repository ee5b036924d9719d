// The rotary embedding of a few elements, with the same roundings wherever it is applied.
#ifndef STARLING_ROTARY_H
#define STARLING_ROTARY_H
#include "device.h"

// Rotates two elements; `other` holds the two that they are paired with, half a head away; `second`: `own` holds the
// second elements of the pairs.
DEVICE u32 turn(u32 own, u32 other, float2 cos, float2 sin, bool second) {
  const float low = low_half(other) * sin.x, high = high_half(other) * sin.y;
  return pack_halves(fmaf(low_half(own), cos.x, second ? low : -low),
                     fmaf(high_half(own), cos.y, second ? high : -high));
}

// Rotates eight; cosines and sines are float32, aligned to 16 bytes.
DEVICE uint4 turn(uint4 own, uint4 other, const float* cos, const float* sin, bool second) {
  const float4 c0 = *(const float4*)cos, c1 = *(const float4*)(cos + 4);
  const float4 s0 = *(const float4*)sin, s1 = *(const float4*)(sin + 4);
  return make_uint4(turn(own.x, other.x, make_float2(c0.x, c0.y), make_float2(s0.x, s0.y), second),
                    turn(own.y, other.y, make_float2(c0.z, c0.w), make_float2(s0.z, s0.w), second),
                    turn(own.z, other.z, make_float2(c1.x, c1.y), make_float2(s1.x, s1.y), second),
                    turn(own.w, other.w, make_float2(c1.z, c1.w), make_float2(s1.z, s1.w), second));
}

#endif
