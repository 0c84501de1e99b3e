// Factors of 8 or 4 bits, multiplied as they are stored.
//
// A number of a factor is a whole number times a bfloat16 scale that `group` rows of a column share:
// V (b2, q, r) with scales (b2, ceil(q / group), r), and U (b1, p, r) alike. Rows of nibbles have an
// even number of columns, `stored`. With few tokens, scales are applied behind a group of products
// on the right and before one on the left; with many, while panels are packed.
#pragma once

#include "few_tokens.h"
#include "many_tokens.h"

// to += scale * from, number by number.
inline void add_scaled(long count, const BFloat16* scale, const float* from, float* to) {
  long c = 0;
  for (; c + W <= count; c += W) {
    Vec total = load(to + c);
    add(total, load(scale + c), load(from + c));
    store(to + c, total);
  }
  for (; c < count; ++c) add(to[c], to_float(scale[c]), from[c]);
}

template <int BITS, class T>
struct QuantizedFactors {
  const Product<T>& a;
  Packed<BITS> U, V;
  const BFloat16 *U_scale, *V_scale;
  long group, stored;

  long groups(long rows) const { return (rows + group - 1) / group; }

  template <int TOKENS>
  void right(long j, Range rank, const float* xj, float* zj) const {
    long width = rank.to - rank.from;
    thread_local std::vector<float> part;
    part.resize(TOKENS * width);
    std::fill_n(zj, TOKENS * width, 0.0f);
    for (long k = 0; k < a.q; k += group) {
      std::fill(part.begin(), part.end(), 0.0f);
      long rows = std::min(group, a.q - k);
      Packed<BITS> v = V + ((j * a.q + k) * stored + rank.from);
      add_all_rows<TOKENS>(rows, width, xj + k, a.q, v, stored, part.data());
      const BFloat16* scale = V_scale + (j * groups(a.q) + k / group) * a.r + rank.from;
      for (int t = 0; t < TOKENS; ++t)
        add_scaled(width, scale, part.data() + t * width, zj + t * width);
    }
  }

  template <int TOKENS>
  void left(Range rows, const float* w) const {
    thread_local std::vector<float> scaled;
    scaled.resize(TOKENS * stored);
    float rests[TOKENS * W];
    for (long row = rows.from, end; row < rows.to; row = end) {
      long i = row / a.p, l = row % a.p, g = l / group;
      end = std::min({rows.to, (i + 1) * a.p, i * a.p + (g + 1) * group});
      const BFloat16* scale = U_scale + (i * groups(a.p) + g) * a.r;
      for (int t = 0; t < TOKENS; ++t) {
        const float* from = w + (i * TOKENS + t) * a.r;
        float* to = scaled.data() + t * stored;
        std::fill(to, to + stored, 0.0f);
        add_scaled(a.r, scale, from, to);
      }
      T* y = a.y + row;
      left_block<TOKENS>(end - row, stored, Segments{1, stored, 0, 0}, U + row * stored,
                         scaled.data(), rests, [&](long k, int t, float value) {
                           put(y + t * a.out_features + k, value);
                         });
    }
  }

  const void* left_address(long row) const { return address(U + row * stored); }

  void pack_right(long j, long k, long depth, Range rank, float* panels) const {
    long width = rank.to - rank.from;
    pack(depth, width, V + ((j * a.q + k) * stored + rank.from), stored, panels);
    for (long from = 0; from < width; from += PANEL)
      for (long row = 0; row < depth; ++row) {
        const BFloat16* scale = V_scale + (j * groups(a.q) + (k + row) / group) * a.r + rank.from;
        float* to = panels + from * depth + row * PANEL;
        for (long c = 0; c < std::min(long(PANEL), width - from); ++c)
          to[c] *= to_float(scale[from + c]);
      }
  }

  // The rows of U from `first` of block row i on, as numbers.
  struct ScaledRows {
    const QuantizedFactors& f;
    long i, first, from;

    const BFloat16* scale(long row, long k) const {
      return f.U_scale + (i * f.groups(f.a.p) + (first + row) / f.group) * f.a.r + from + k;
    }
    Packed<BITS> at(long row) const { return f.U + (i * f.a.p + first + row) * f.stored; }
    Vec vector(long row, long k) const { return load(at(row) + (from + k)) * load(scale(row, k)); }
    float number(long row, long k) const { return at(row)[from + k] * to_float(*scale(row, k)); }
  };

  void pack_left(long i, long row, long count, long k, long depth, float* panels) const {
    pack_transposed(depth, count, ScaledRows{*this, i, row, k}, panels, depth);
  }
};
