// One to four tokens: the factors are streamed once, everything else stays in the cache. From five
// tokens on, packing the factors pays.
//
// A thread takes a range of the rank for z_j = V_j^T x_j and w_i = sum_j s_ij z_j, which need no
// other thread there; after one barrier it takes a range of rows for y_i = U_i w_i.
#pragma once

#include "product.h"

// z (TOKENS, width) += x (TOKENS, ROWS) times ROWS rows of v, of stride ldv.
template <int TOKENS, int ROWS, class T>
inline void add_rows(long width, const float* x, long ldx, const T* v, long ldv, float* z) {
  Vec xs[ROWS][TOKENS];
#pragma GCC unroll 8
  for (int k = 0; k < ROWS; ++k)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) xs[k][t] = broadcast(x[t * ldx + k]);
  long c = 0;
  for (; c + W <= width; c += W) {
    Vec rows[ROWS];
#pragma GCC unroll 8
    for (int k = 0; k < ROWS; ++k) rows[k] = load(v + k * ldv + c);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      Vec total = load(z + t * width + c);
#pragma GCC unroll 8
      for (int k = 0; k < ROWS; ++k) add(total, xs[k][t], rows[k]);
      store(z + t * width + c, total);
    }
  }
  for (; c < width; ++c)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
      for (int k = 0; k < ROWS; ++k)
        add(z[t * width + c], x[t * ldx + k], to_float(v[k * ldv + c]));
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

// ROWS x TOKENS dot products of length r: rows of U times the tokens' w, sums of W together.
// What is left of r behind whole vectors is read again with the last whole vector of U; `rests`
// (TOKENS, W) holds w there, and zeros where it has been counted.
template <int TOKENS, int ROWS, class T>
inline Vec dot_rows(long r, const T* u, const float* w, const float* rests) {
  static_assert(ROWS * TOKENS <= W);
  Vec acc[W] = {};
  auto step = [&](const float* ws, long next, const T* us) {
    Vec tokens[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) tokens[t] = load(ws + t * next);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      Vec row = load(us + i * r);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) add(acc[i * TOKENS + t], row, tokens[t]);
    }
  };
  long k = 0;
  for (; k + W <= r; k += W) step(w + k, r, u + k);
  if (k < r && r >= W) step(rests, W, u + r - W);
  transpose(acc);
  Vec total = acc[0];
#pragma GCC unroll 16
  for (int lane = 1; lane < W; ++lane) total += acc[lane];
  if (r < W)
    for (int i = 0; i < ROWS; ++i)
      for (int t = 0; t < TOKENS; ++t) {
        float one = 0;
        for (long c = 0; c < r; ++c) add(one, to_float(u[i * r + c]), w[t * r + c]);
        total[i * TOKENS + t] = one;
      }
  return total;
}

// z_j for all j and w_i for all i over the columns `rank` of the factors.
template <int TOKENS, class T>
void right_and_couple(const Product<T>& a, Range rank, const float* x, float* z, float* w) {
  constexpr int ROWS = TOKENS <= 2 ? 4 : 2;
  long width = rank.to - rank.from, next = TOKENS * width;
  std::fill(z, z + a.b2 * next, 0.0f);
  for (long j = 0; j < a.b2; ++j) {
    const T* v = a.V + j * a.q * a.r + rank.from;
    const float* xj = x + j * TOKENS * a.q;
    long k = 0;
    for (; k + ROWS <= a.q; k += ROWS)
      add_rows<TOKENS, ROWS>(width, xj + k, a.q, v + k * a.r, a.r, z + j * next);
    for (; k < a.q; ++k) add_rows<TOKENS, 1>(width, xj + k, a.q, v + k * a.r, a.r, z + j * next);
  }
  for (long i = 0; i < a.b1; ++i) {
    float* wi = w + i * TOKENS * a.r + rank.from;
    if (a.S)
      couple<TOKENS>(width, a.b2, a.S + i * a.b2 * a.r + rank.from, a.r, z, next, wi, a.r);
    else
      for (int t = 0; t < TOKENS; ++t) std::copy_n(z + t * width, width, wi + t * a.r);
  }
}

// y = U_i w_i for rows [rows.from, rows.to) of the matrix; block rows follow one another in U.
template <int TOKENS, class T>
void left_rows(const Product<T>& a, Range rows, const float* w) {
  constexpr int ROWS = W / TOKENS;
  for (long row = rows.from, end; row < rows.to; row = end) {
    long i = row / a.p, rest = a.r % W;
    end = std::min(rows.to, (i + 1) * a.p);
    const float* wi = w + i * TOKENS * a.r;
    float rests[TOKENS * W] = {};
    for (int t = 0; t < TOKENS && a.r >= W; ++t)
      std::copy_n(wi + (t + 1) * a.r - rest, rest, rests + (t + 1) * W - rest);
    auto put_rows = [&](Vec result, int count) {
      for (int k = 0; k < count; ++k)
        for (int t = 0; t < TOKENS; ++t)
          put(a.y + t * a.out_features + row + k, result[k * TOKENS + t]);
    };
    for (; row + ROWS <= end; row += ROWS)
      put_rows(dot_rows<TOKENS, ROWS>(a.r, a.U + row * a.r, wi, rests), ROWS);
    for (; row < end; ++row) put_rows(dot_rows<TOKENS, 1>(a.r, a.U + row * a.r, wi, rests), 1);
  }
}

template <int TOKENS, class T>
void few_tokens(const Product<T>& a, int threads) {
  long x_size = whole_lines(TOKENS * a.b2 * a.q), w_size = whole_lines(a.b1 * TOKENS * a.r);
  float* x = scratch(x_size + w_size + a.b2 * TOKENS * whole_lines(a.r));
  float *w = x + x_size, *z = w + w_size;
  split_columns(a, 0, TOKENS, {0, TOKENS}, x, a.q);
  auto part = [&](int thread, int threads, auto barrier) {
    Range rank = share(a.r, 16, thread, threads);
    if (rank.from < rank.to) right_and_couple<TOKENS>(a, rank, x, z + a.b2 * TOKENS * rank.from, w);
    barrier();
    left_rows<TOKENS>(a, share(a.out_features, W, thread, threads), w);
  };
  in_parallel(threads, part);
}
