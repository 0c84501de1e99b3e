// One to four tokens: the factors are streamed once, everything else stays in the cache. From five
// tokens on, packing the factors pays.
//
// A thread takes a range of the rank for z_j = V_j^T x_j and w_i = sum_j s_ij z_j, which need no
// other thread there; after one barrier it takes a range of rows for y_i = U_i w_i.
#pragma once

#include "panel.h"
#include "product.h"

constexpr long AHEAD = 2048;  // bytes between what is read and what is asked for

// `count` cache lines from `from` on are asked for, to be there when they are needed.
inline void ask_for(const void* from, long count) {
  auto byte = static_cast<const char*>(from);
  for (long line = 0; line < count; ++line) __builtin_prefetch(byte + 64 * line);
}

// z (TOKENS, width) += x (TOKENS, ROWS) times ROWS rows of v, of stride ldv. Their sum is made by
// itself: added one by one to a sum of hundreds, they would be rounded as it is.
template <int TOKENS, int ROWS, class P>
inline void add_rows(long width, const float* x, long ldx, P v, long ldv, float* z) {
  Vec xs[ROWS][TOKENS];
#pragma GCC unroll 8
  for (int k = 0; k < ROWS; ++k)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) xs[k][t] = broadcast(x[t * ldx + k]);
  long c = 0;
  for (; c + W <= width; c += W) {
    Vec rows[ROWS];
#pragma GCC unroll 8
    for (int k = 0; k < ROWS; ++k) rows[k] = load(v + (k * ldv + c));
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      Vec part = xs[0][t] * rows[0];
#pragma GCC unroll 8
      for (int k = 1; k < ROWS; ++k) add(part, xs[k][t], rows[k]);
      store(z + t * width + c, load(z + t * width + c) + part);
    }
  }
  for (; c < width; ++c)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      float part = 0;
#pragma GCC unroll 8
      for (int k = 0; k < ROWS; ++k) add(part, x[t * ldx + k], to_float(v[k * ldv + c]));
      z[t * width + c] += part;
    }
}

// out (TOKENS, columns of stride ldo) = sum_j s[j] * z[j], for one block row; `next` is from z_j on.
template <int TOKENS, class T>
inline void couple(long width, long b2, const T* s, long lds, const float* z, long next, float* out,
                   long ldo) {
  long c = 0;
  for (; c + W <= width; c += W) {
    Vec total[TOKENS] = {};
    for (long j = 0; j < b2; ++j) {
      Vec coupling = load(s + j * lds + c);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) add(total[t], coupling, load(z + j * next + t * width + c));
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) store(out + t * ldo + c, total[t]);
  }
  for (; c < width; ++c)
    for (int t = 0; t < TOKENS; ++t) {
      float total = 0;
      for (long j = 0; j < b2; ++j) add(total, to_float(s[j * lds + c]), z[j * next + t * width + c]);
      out[t * ldo + c] = total;
    }
}

// Where the operands of `dot_rows` lie: `count` segments of r products each (one for BLAST), and
// rows of U that are ldu apart.
struct Segments {
  long count, ldu, next_u, next_w;
};

// ROWS x TOKENS dot products of length r: rows of U times the tokens' w, sums of W together.
// What is left of r behind whole vectors is read again with the last whole vector of U; `rests`
// (segments, TOKENS, W) holds w there, and zeros where it has been counted.
template <int TOKENS, int ROWS, class P>
inline Vec dot_rows(long r, const Segments& segments, P u, const float* w, const float* rests) {
  static_assert(ROWS * TOKENS <= W);
  // The rows that come next, which lie behind these, a share with every step.
  const int LINES = std::max(1L, bytes_of(u, ROWS * W) / 64);
  Vec acc[W] = {};
  auto step = [&](const float* ws, long next, P us) {
    Vec tokens[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) tokens[t] = load(ws + t * next);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      Vec row = load(us + i * segments.ldu);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) add(acc[i * TOKENS + t], row, tokens[t]);
    }
  };
  for (long s = 0; r >= W && s < segments.count; ++s) {
    P us = u + s * segments.next_u;
    const float* ws = w + s * segments.next_w;
    long k = 0;
    const char* next = static_cast<const char*>(address(us + ROWS * segments.ldu));
    for (; k + W <= r; k += W) {
      for (int line = 0; line < LINES; ++line) __builtin_prefetch(next + 64 * line);
      next += 64 * LINES;
      step(ws + k, r, us + k);
    }
    if (k < r) step(rests + s * TOKENS * W, W, us + (r - W));
  }
  transpose(acc);
  Vec total = acc[0];
#pragma GCC unroll 16
  for (int lane = 1; lane < W; ++lane) total += acc[lane];
  if (r < W)
    for (int i = 0; i < ROWS; ++i)
      for (int t = 0; t < TOKENS; ++t) {
        float one = 0;
        for (long s = 0; s < segments.count; ++s)
          for (long c = 0; c < r; ++c)
            add(one, to_float(u[s * segments.next_u + i * segments.ldu + c]), w[s * segments.next_w + t * r + c]);
        total[i * TOKENS + t] = one;
      }
  return total;
}

// What `dot_rows` reads of w behind whole vectors.
template <int TOKENS>
inline void take_rests(long r, const Segments& segments, const float* w, float* rests) {
  long rest = r % W;
  std::fill_n(rests, segments.count * TOKENS * W, 0.0f);
  for (long s = 0; r >= W && s < segments.count; ++s)
    for (int t = 0; t < TOKENS; ++t)
      std::copy_n(w + s * segments.next_w + (t + 1) * r - rest, rest,
                  rests + (s * TOKENS + t + 1) * W - rest);
}

// out(row, token, value) for rows [0, count) of one block row, from where `u` and `w` point.
template <int TOKENS, class P, class Out>
inline void left_block(long count, long r, const Segments& segments, P u, const float* w,
                       float* rests, Out out) {
  constexpr int ROWS = W / TOKENS;
  take_rests<TOKENS>(r, segments, w, rests);
  long row = 0;
  auto put_rows = [&](Vec result, int rows) {
    for (int k = 0; k < rows; ++k)
      for (int t = 0; t < TOKENS; ++t) out(row + k, t, result[k * TOKENS + t]);
    row += rows;
  };
  while (row + ROWS <= count)
    put_rows(dot_rows<TOKENS, ROWS>(r, segments, u + row * segments.ldu, w, rests), ROWS);
  while (row < count) put_rows(dot_rows<TOKENS, 1>(r, segments, u + row * segments.ldu, w, rests), 1);
}

// ROWS rows at a time: z (TOKENS, width) += x (TOKENS, rows) times rows of v.
template <int TOKENS, class P>
inline void add_all_rows(long rows, long width, const float* x, long ldx, P v, long ldv, float* z) {
  constexpr int ROWS = TOKENS <= 2 ? 4 : 2;
  long k = 0, lines = bytes_of(v, width) / 64 + 1;
  long ahead = (AHEAD / (64 * lines * ROWS) + 1) * ROWS;
  for (; k + ROWS <= rows; k += ROWS) {
    for (long row = k + ahead; row < k + ahead + ROWS; ++row) ask_for(address(v + row * ldv), lines);
    add_rows<TOKENS, ROWS>(width, x + k, ldx, v + k * ldv, ldv, z);
  }
  for (; k < rows; ++k) add_rows<TOKENS, 1>(width, x + k, ldx, v + k * ldv, ldv, z);
}

// w_i for all i over the columns `rank`, from z (b2, TOKENS, width).
template <int TOKENS, class T>
void couple_rank(const Product<T>& a, Range rank, const float* z, float* w) {
  long width = rank.to - rank.from;
  for (long i = 0; i < a.b1; ++i) {
    float* wi = w + i * TOKENS * a.r + rank.from;
    if (a.S)
      couple<TOKENS>(width, a.b2, a.S + i * a.b2 * a.r + rank.from, a.r, z, TOKENS * width, wi, a.r);
    else
      for (int t = 0; t < TOKENS; ++t) std::copy_n(z + t * width, width, wi + t * a.r);
  }
}

// y = U_i w_i for rows [rows.from, rows.to) of the matrix; block rows follow one another in U.
template <int TOKENS, class T>
void left_rows(const Product<T>& a, Range rows, const float* w) {
  float rests[TOKENS * W];
  for (long row = rows.from, end; row < rows.to; row = end) {
    long i = row / a.p;
    end = std::min(rows.to, (i + 1) * a.p);
    T* y = a.y + row;
    left_block<TOKENS>(end - row, a.r, Segments{1, a.r, 0, 0}, a.U + row * a.r, w + i * TOKENS * a.r, rests,
                       [&](long k, int t, float value) { put(y + t * a.out_features + k, value); });
  }
}

// Factors as they are trained: numbers of the input's type.
template <class T>
struct PlainFactors {
  const Product<T>& a;

  // z_j (TOKENS, width) of one block column over the columns `rank`.
  template <int TOKENS>
  void right(long j, Range rank, const float* xj, float* zj) const {
    long width = rank.to - rank.from;
    std::fill_n(zj, TOKENS * width, 0.0f);
    add_all_rows<TOKENS>(a.q, width, xj, a.q, a.V + j * a.q * a.r + rank.from, a.r, zj);
  }

  template <int TOKENS>
  void left(Range rows, const float* w) const {
    left_rows<TOKENS>(a, rows, w);
  }

  const void* left_address(long row) const { return address(a.U + row * a.r); }

  void pack_right(long j, long k, long depth, Range rank, float* panels) const {
    pack(depth, rank.to - rank.from, a.V + (j * a.q + k) * a.r + rank.from, a.r, panels);
  }

  void pack_left(long i, long row, long count, long k, long depth, float* panels) const {
    Rows<T> rows{a.U + (i * a.p + row) * a.r + k, a.r};
    pack_transposed(depth, count, rows, panels, depth);
  }
};

template <int TOKENS, class T, class Factors>
void few_tokens(const Product<T>& a, const Factors& factors, int threads) {
  long x_size = whole_lines(TOKENS * a.b2 * a.q), w_size = whole_lines(a.b1 * TOKENS * a.r);
  float* x = scratch(x_size + w_size + a.b2 * TOKENS * whole_lines(a.r));
  float *w = x + x_size, *all_z = w + w_size;
  split_columns(a, 0, TOKENS, {0, TOKENS}, x, a.q);
  in_parallel(threads, [&](int thread, int threads, auto barrier) {
    Range rank = share(a.r, 16, thread, threads);
    long width = rank.to - rank.from;
    float* z = all_z + a.b2 * TOKENS * rank.from;
    for (long j = 0; width && j < a.b2; ++j)
      factors.template right<TOKENS>(j, rank, x + j * TOKENS * a.q, z + j * TOKENS * width);
    Range rows = share(a.out_features, W, thread, threads);
    ask_for(factors.left_address(rows.from), AHEAD / 64);
    if (width) couple_rank<TOKENS>(a, rank, z, w);
    barrier();
    factors.template left<TOKENS>(rows, w);
  });
}
