// Causal attention of a prompt over itself, softmax(scale Q K^T) V: products of packed panels. The
// scores of a few queries stay in cache, and of those behind the diagonal hardly any are made.
#pragma once

#include <limits>

#include "exponential.h"
#include "panel.h"
#include "product.h"

constexpr int QUERIES = 2 * MAX_ROWS;  // of one head, together

// Of (batch, heads, tokens, width) with any strides but the last, which is 1.
struct Heads {
  const float* first;
  long next_batch, next_head, next_token;

  const float* at(long batch, long head, long token) const {
    return first + batch * next_batch + head * next_head + token * next_token;
  }
};

struct Attention {
  long batch, heads, kv_heads, tokens, width;
  float scale;
  Heads q, k, v;
  float* y;  // (batch, tokens, heads, width)
};

// Row of scores to exp(scale (score - largest)) up to `count`, zeros from there to `end`; the sum.
inline float soften(float* row, long count, long end, float scale) {
  long whole = (count + W - 1) / W * W;
  std::fill(row + count, row + whole, -std::numeric_limits<float>::max());
  Vec lanes = load(row), sum{}, factor = broadcast(scale);
  for (long c = W; c < whole; c += W) {
    Vec next = load(row + c);
    lanes = next > lanes ? next : lanes;
  }
  float largest = lanes[0];
  for (int lane = 1; lane < W; ++lane) largest = std::max(largest, lanes[lane]);
  Vec top = broadcast(largest);
  for (long c = 0; c < whole; c += W) {
    Vec e = exp_of((load(row + c) - top) * factor);
    store(row + c, e);
    sum += e;
  }
  if (end > count) std::fill(row + count, row + end, 0.0f);
  return sum_of(sum);
}

// Some queries of one head, with its packed keys and values. Memory: QUERIES rows of scores with
// their stride, and of outputs.
inline void attend_some(const Attention& a, long batch, long head, long first, const float* keys,
                        const float* values, float* scores, long stride) {
  int rows = int(std::min<long>(QUERIES, a.tokens - first));
  long seen = first + rows, wide = panels_of(a.width) * PANEL;
  float* out = scores + QUERIES * stride;
  multiply(rows, int(seen), int(a.width), a.q.at(batch, head, first), a.q.next_token, keys, scores,
           stride, false);
  float sums[QUERIES];
  for (int t = 0; t < rows; ++t) sums[t] = soften(scores + t * stride, first + t + 1, seen, a.scale);
  for (long c = 0; c < a.width; c += PANEL)
    multiply_deep(rows, int(std::min<long>(PANEL, a.width - c)), seen, scores, stride,
                  values + c * a.tokens, out + c, wide);
  for (int t = 0; t < rows; ++t) {
    float* y = a.y + ((batch * a.tokens + first + t) * a.heads + head) * a.width;
    for (long c = 0; c < a.width; ++c) y[c] = out[t * wide + c] / sums[t];
  }
}

inline void attend_all(const Attention& a, int threads) {
  long key_floats = whole_lines(panels_of(a.tokens) * PANEL * a.width);
  long value_floats = whole_lines(panels_of(a.width) * PANEL * a.tokens);
  long stride = row_stride(panels_of(a.tokens) * PANEL);
  long own = whole_lines(QUERIES * (stride + panels_of(a.width) * PANEL));
  long packed = key_floats + value_floats, sets = a.batch * a.kv_heads;
  float* panels = scratch(sets * packed + threads * own);
  float* buffers = panels + sets * packed;
  in_parallel(threads, [&](int thread, int parts, auto barrier) {
    for (long set = thread; set < sets; set += parts) {
      long batch = set / a.kv_heads, head = set % a.kv_heads;
      float* to = panels + set * packed;
      Rows<float> keys{a.k.at(batch, head, 0), a.k.next_token};
      pack_transposed(int(a.width), int(a.tokens), keys, to, int(a.width));
      pack(int(a.tokens), int(a.width), a.v.at(batch, head, 0), a.v.next_token, to + key_floats);
    }
    barrier();
    // Later queries see more keys: the threads take turns.
    long chunks = (a.tokens + QUERIES - 1) / QUERIES;
    for (long unit = thread; unit < a.batch * a.heads * chunks; unit += parts) {
      long head = unit / chunks % a.heads, batch = unit / chunks / a.heads;
      long set = batch * a.kv_heads + head / (a.heads / a.kv_heads);
      const float* keys = panels + set * packed;
      attend_some(a, batch, head, unit % chunks * QUERIES, keys, keys + key_floats,
                  buffers + thread * own, stride);
    }
    barrier();
  });
}
