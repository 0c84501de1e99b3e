// What a product is made of, and how threads share it.
//
// Letters: T tokens, n in_features, m out_features, b1 x b2 blocks of p x q, r rank.
#pragma once

#include <omp.h>

#include <algorithm>
#include <vector>

#include "simd.h"

template <class T>
struct Product {
  long tokens, in_features, out_features;
  long b1, b2, p, q, r;
  const T* x;  // (T, n)
  const T* U;  // (b1, p, r)
  const T* S;  // (b1, b2, r); null for low rank, whose couplings are 1
  const T* V;  // (b2, q, r)
  T* y;        // (T, m)
};

struct Range {
  long from, to;
};

// The share of `part` in `total` things, handed out in pieces of `grain`.
inline Range share(long total, long grain, int part, int parts) {
  long pieces = (total + grain - 1) / grain;
  long from = pieces * part / parts * grain, to = pieces * (part + 1) / parts * grain;
  return {std::min(from, total), std::min(to, total)};
}

// part(thread, threads, barrier) on every thread; the barrier waits for all of them.
template <class Part>
void in_parallel(int threads, const Part& part) {
  if (threads == 1) return part(0, 1, [] {});
#pragma omp parallel num_threads(threads)
  part(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
  });
}

// Scratch memory of the calling thread, kept between calls: fresh pages cost more than the product.
inline float* scratch(size_t floats) {
  thread_local std::vector<float> memory;
  if (memory.size() < floats + 16) memory.resize(floats + 16);
  auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

inline long whole_lines(long floats) { return (floats + 15) / 16 * 16; }

// A row length that is no multiple of two cache lines, so that rows do not meet in one cache set.
inline long row_stride(long floats) { return whole_lines(floats) | 16; }

// Input tokens [0, count) in float32, cut at block columns: (b2, count, q of
// stride ldq), zeros behind the end.
template <class T>
void split_columns(const Product<T>& a, long first, long count, Range tokens, float* to, long ldq) {
  for (long t = tokens.from; t < tokens.to; ++t) {
    const T* row = a.x + (first + t) * a.in_features;
    for (long j = 0; j < a.b2; ++j) {
      float* out = to + (j * count + t) * ldq;
      long width = std::clamp(a.in_features - j * a.q, 0L, a.q), k = 0;
      for (; k + W <= width; k += W) store(out + k, load(row + j * a.q + k));
      for (; k < width; ++k) out[k] = to_float(row[j * a.q + k]);
      std::fill(out + width, out + a.q, 0.0f);
    }
  }
}
