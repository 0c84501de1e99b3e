// One to sixteen tokens, four at a time: the factors are streamed once, everything else stays in the cache.
//
// A thread takes a range of the rank for z_j = V_j^T x_j and w_i = sum_j s_ij z_j, which need no
// other thread there; after one barrier it takes a range of rows for y_i = U_i w_i.
#pragma once

#include "product.h"

constexpr long FEW_TOKENS = 16;

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
    for (int t = 0; t < TOKENS; ++t)
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

// ROWS x TOKENS dot products of length r: rows of U times the tokens' w.
template <int TOKENS, int ROWS, class T>
inline void dot_rows(long r, const T* u, const float* w, float* result) {
  Vec acc[ROWS][TOKENS] = {};
  long k = 0;
  for (; k + W <= r; k += W) {
    Vec ws[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) ws[t] = load(w + t * r + k);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      Vec row = load(u + i * r + k);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) add(acc[i][t], row, ws[t]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int t = 0; t < TOKENS; ++t) {
      float total = sum(acc[i][t]);
      for (long rest = k; rest < r; ++rest) add(total, to_float(u[i * r + rest]), w[t * r + rest]);
      result[i * TOKENS + t] = total;
    }
}

// Calls body(first, count) with a compile-time count for groups of at most four of the tokens.
template <class Body>
inline void in_fours(long tokens, Body body) {
  long t = 0;
  for (; t + 4 <= tokens; t += 4) body(t, std::integral_constant<int, 4>{});
  if (tokens - t == 3) body(t, std::integral_constant<int, 3>{});
  if (tokens - t == 2) body(t, std::integral_constant<int, 2>{});
  if (tokens - t == 1) body(t, std::integral_constant<int, 1>{});
}

// COUNT rows of V at once while they are in the cache: z_j (tokens, width) grows by them.
template <int COUNT, class T>
inline void add_to_all(long tokens, long width, const float* x, long ldx, const T* v, long ldv,
                       float* z) {
  in_fours(tokens, [&](long t, auto four) {
    add_rows<four(), COUNT>(width, x + t * ldx, ldx, v, ldv, z + t * width);
  });
}

// z_j for all j and w_i for all i over the columns `rank` of the factors.
template <class T>
void right_and_couple(const Product<T>& a, Range rank, const float* x, float* z, float* w) {
  long width = rank.to - rank.from, tokens = a.tokens;
  if (width == 0) return;
  std::fill(z, z + a.b2 * tokens * width, 0.0f);
  for (long j = 0; j < a.b2; ++j) {
    const T* v = a.V + j * a.q * a.r + rank.from;
    const float* xj = x + j * tokens * a.q;
    float* zj = z + j * tokens * width;
    long k = 0, rows = tokens <= 2 ? 4 : 2;
    for (; k + rows <= a.q; k += rows) {
      if (rows == 4)
        add_to_all<4>(tokens, width, xj + k, a.q, v + k * a.r, a.r, zj);
      else
        add_to_all<2>(tokens, width, xj + k, a.q, v + k * a.r, a.r, zj);
    }
    for (; k < a.q; ++k) add_to_all<1>(tokens, width, xj + k, a.q, v + k * a.r, a.r, zj);
  }
  for (long i = 0; i < a.b1; ++i) {
    float* wi = w + i * tokens * a.r + rank.from;
    if (!a.S) {
      for (long t = 0; t < tokens; ++t) std::copy_n(z + t * width, width, wi + t * a.r);
      continue;
    }
    const T* s = a.S + i * a.b2 * a.r + rank.from;
    in_fours(tokens, [&](long t, auto four) {
      couple<four()>(width, a.b2, s, a.r, z + t * width, tokens * width, wi + t * a.r, a.r);
    });
  }
}

// y = U_i w_i for COUNT rows of U, read once for all tokens.
template <int COUNT, class T>
inline void left_few_rows(const Product<T>& a, long row, const float* wi) {
  in_fours(a.tokens, [&](long t, auto four) {
    float result[COUNT * four()];
    dot_rows<four(), COUNT>(a.r, a.U + row * a.r, wi + t * a.r, result);
    for (int k = 0; k < COUNT; ++k)
      for (int c = 0; c < four(); ++c)
        put(a.y + (t + c) * a.out_features + row + k, result[k * four() + c]);
  });
}

// The same for rows [rows.from, rows.to) of the matrix; block rows follow one another in U.
template <class T>
void left_rows(const Product<T>& a, Range rows, const float* w) {
  for (long row = rows.from; row < rows.to;) {
    long i = row / a.p, end = std::min(rows.to, (i + 1) * a.p);
    const float* wi = w + i * a.tokens * a.r;
    for (; row + 3 <= end; row += 3) left_few_rows<3>(a, row, wi);
    for (; row < end; ++row) left_few_rows<1>(a, row, wi);
  }
}

template <class T>
void few_tokens(const Product<T>& a, int threads) {
  long x_size = whole_lines(a.tokens * a.b2 * a.q), w_size = whole_lines(a.b1 * a.tokens * a.r);
  float* x = scratch(x_size + w_size + a.b2 * a.tokens * whole_lines(a.r));
  float *w = x + x_size, *z = w + w_size;
  split_columns(a, 0, a.tokens, {0, a.tokens}, x, a.q);
  auto part = [&](int thread, int threads, auto barrier) {
    Range rank = share(a.r, 16, thread, threads);
    right_and_couple(a, rank, x, z + a.b2 * a.tokens * rank.from, w);
    barrier();
    left_rows(a, share(a.out_features, 3, thread, threads), w);
  };
  if (threads == 1) return part(0, 1, [] {});
#pragma omp parallel num_threads(threads)
  part(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
  });
}
