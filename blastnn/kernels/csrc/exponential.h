// The exponential function, for attention and gates.
#pragma once

#include "simd.h"

// exp(x) for x <= 0, to float32's last bits; below -87 as at -87, which is nothing beside 1.
inline Vec exp_of(Vec x) {
  const Vec least = broadcast(-87.0f), shift = broadcast(12582912.0f);  // 1.5 * 2^23
  x = x < least ? least : x;
  Vec n = shift;
  add(n, x, broadcast(1.44269504f));
  Vec whole = n - shift, rest = x;
  add(rest, whole, broadcast(-0.693359375f));
  add(rest, whole, broadcast(2.12194440e-4f));
  Vec sum = broadcast(1.0f / 5040.0f);
  for (float factor : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) {
    Vec next = broadcast(factor);
    add(next, sum, rest);
    sum = next;
  }
  // The integer sits in the lowest bits of n: on to the exponent with it.
  return reinterpret_cast<Vec>(reinterpret_cast<UintVec>(sum) +
                               (reinterpret_cast<UintVec>(n) << 23));
}
