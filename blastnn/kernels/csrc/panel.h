// Products of packed panels, the inner loop of every stage with more than a few tokens.
//
// C (tokens x columns) = A (tokens x depth) B (depth x columns), float32 throughout: B is packed
// into panels of PANEL columns, contiguous along the depth; A is row-major. A micro-kernel keeps
// ROWS x 2 vectors of C in registers (Goto and van de Geijn 2008). Every element of C is a sum,
// in order, of chains of fused multiply-adds as long as the blocks of depth; these do not depend on
// the number of threads, and keep the error smaller than one long chain would.
#pragma once

#include <algorithm>

#include "simd.h"

constexpr int PANEL = 2 * W;
constexpr int DEPTH = 256;  // of a panel: PANEL * DEPTH floats stay in the first-level cache

// The third vector of a row, if there are three, is the first of the panel behind this one. Of a
// last vector that is PART of one, `shown` columns are stored.
template <int ROWS, int VECS, bool PART>
inline void micro(int depth, const float* __restrict a, long lda, const float* __restrict panel,
                  float* __restrict c, long ldc, bool accumulate, int shown) {
  Vec acc[ROWS][VECS] = {};
  // The rows that the next call reads are asked for meanwhile.
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) __builtin_prefetch(a + (ROWS + i) * lda);
  const float* behind = panel + long(PANEL) * depth;
  for (int k = 0; k < depth; ++k) {
    Vec b[VECS];
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v)
      b[v] = load(v < 2 ? panel + long(k) * PANEL + v * W : behind + long(k) * PANEL);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      Vec value = broadcast(a[i * lda + k]);
#pragma GCC unroll 3
      for (int v = 0; v < VECS; ++v) add(acc[i][v], value, b[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) {
      float* to = c + i * ldc + v * W;
      if (PART && v == VECS - 1)
        store_some(to, accumulate ? load_some(to, shown) + acc[i][v] : acc[i][v], shown);
      else
        store(to, accumulate ? load(to) + acc[i][v] : acc[i][v]);
    }
}

// Rows that VECS vectors each leave registers for.
template <int VECS>
constexpr int ROWS_OF = VECS > 2 ? MAX_ROWS * 2 / VECS : MAX_ROWS;

template <int VECS, bool PART, int ROWS = ROWS_OF<VECS>>
inline void rest_of_rows(int rows, int depth, const float* a, long lda, const float* panel,
                         float* c, long ldc, bool accumulate, int shown) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      micro<ROWS, VECS, PART>(depth, a, lda, panel, c, ldc, accumulate, shown);
    else
      rest_of_rows<VECS, PART, ROWS - 1>(rows, depth, a, lda, panel, c, ldc, accumulate, shown);
  }
}

// C (tokens, VECS vectors) (+)= A (tokens, depth) panel.
template <int VECS, bool PART>
inline void rows_of(int tokens, int depth, const float* a, long lda, const float* panel, float* c,
                    long ldc, bool accumulate, int shown) {
  constexpr int ROWS = ROWS_OF<VECS>;
  int done = 0;
  for (; done + ROWS <= tokens; done += ROWS)
    micro<ROWS, VECS, PART>(depth, a + done * lda, lda, panel, c + done * ldc, ldc, accumulate, shown);
  rest_of_rows<VECS, PART>(tokens - done, depth, a + done * lda, lda, panel, c + done * ldc, ldc,
                           accumulate, shown);
}

// The same, `shown` of the last vector's columns; how many is no part of the inner loop.
template <int VECS>
inline void all_rows(int tokens, int depth, const float* a, long lda, const float* panel, float* c,
                     long ldc, bool accumulate, int shown) {
  if (shown == W)
    rows_of<VECS, false>(tokens, depth, a, lda, panel, c, ldc, accumulate, W);
  else
    rows_of<VECS, true>(tokens, depth, a, lda, panel, c, ldc, accumulate, shown);
}

// C (tokens, columns) (+)= A (tokens, depth) times packed panels, `depth` rows of them. C has room for
// whole vectors, unless it is to be `exact`. What one vector holds behind the last whole panel is done
// with that: by itself it would take as long.
inline void multiply(int tokens, int columns, int depth, const float* a, long lda,
                     const float* panels, float* c, long ldc, bool accumulate, bool exact = false) {
  for (int from = 0; from < columns; from += PANEL) {
    const float* panel = panels + long(from) * depth;
    int left = columns - from;
    int shown = exact && left <= PANEL + W ? (left - 1) % W + 1 : W;
    if (left > PANEL && left <= PANEL + W)
      return all_rows<3>(tokens, depth, a, lda, panel, c + from, ldc, accumulate, shown);
    if (left > W)
      all_rows<2>(tokens, depth, a, lda, panel, c + from, ldc, accumulate, shown);
    else
      all_rows<1>(tokens, depth, a, lda, panel, c + from, ldc, accumulate, shown);
  }
}

inline long panels_of(long columns) { return (columns + PANEL - 1) / PANEL; }

// The same with one panel of any depth.
inline void multiply_deep(int tokens, int columns, long depth, const float* a, long lda,
                          const float* panel, float* c, long ldc) {
  for (long k = 0; k < depth; k += DEPTH)
    multiply(tokens, columns, int(std::min<long>(DEPTH, depth - k)), a + k, lda, panel + k * PANEL,
             c, ldc, k > 0);
}

// Panels of rows `b` (depth x columns, row-major with stride ldb): copied, zeros on the right.
template <class P>
inline void pack(int depth, int columns, P b, long ldb, float* panels) {
  for (int from = 0; from < columns; from += PANEL) {
    int width = std::min(PANEL, columns - from);
    float* to = panels + long(from) * depth;
    for (int k = 0; k < depth; ++k, to += PANEL) {
      P row = b + (k * ldb + from);
      __builtin_prefetch(address(row + 8 * ldb));
      if (width == PANEL) {
        store(to, load(row));
        store(to + W, load(row + W));
      } else {
        for (int c = 0; c < PANEL; ++c) to[c] = c < width ? to_float(row[c]) : 0.0f;
      }
    }
  }
}

// Panels of the transpose of a matrix (columns x depth), whose numbers `read` gives: W of row c
// from k on, or a single one. Columns of the product are its rows. `panels` may point into panels
// of a greater depth, `whole` of it.
template <class Read>
inline void pack_transposed(int depth, int columns, const Read& read, float* panels, int whole) {
  for (int from = 0; from < columns; from += W) {
    float* to = panels + long(from / PANEL) * PANEL * whole + from % PANEL;
    int width = std::min(W, columns - from), k = 0;
    for (; k + W <= depth; k += W) {
      Vec rows[W];
#pragma GCC unroll 16
      for (int c = 0; c < W; ++c) rows[c] = c < width ? read.vector(from + c, k) : Vec{};
      transpose(rows);
#pragma GCC unroll 16
      for (int c = 0; c < W; ++c) store(to + long(k + c) * PANEL, rows[c]);
    }
    for (; k < depth; ++k)
      for (int c = 0; c < W; ++c)
        to[long(k) * PANEL + c] = c < width ? read.number(from + c, k) : 0.0f;
  }
}

// A row-major matrix of stride `next`, to be read by `pack_transposed`.
template <class T>
struct Rows {
  const T* first;
  long next;

  Vec vector(long row, long k) const { return load(first + row * next + k); }
  float number(long row, long k) const { return to_float(first[row * next + k]); }
};
