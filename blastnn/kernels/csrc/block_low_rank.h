// Block low-rank and Monarch: A_ij = U_ij V_ij^T with U (b1, b2, p, t) and V (b1, b2, q, t).
//
// The same two halves as BLAST, with nothing to couple between them: z_ij = V_ij^T x_j for every
// block, then y_i = sum_j U_ij z_ij. In `Product`, r is the rank t of a block and S is unused.
// Monarch shows row l of block row i as row l b1 + i.
#pragma once

#include "few_tokens.h"
#include "many_tokens.h"

// Where row l of block row i is shown; rows behind out_features are padding.
template <class T>
inline long shown_row(const Product<T>& a, bool strided, long i, long l) {
  return strided ? l * a.b1 + i : i * a.p + l;
}

template <int TOKENS, class T>
void few_tokens_of_blocks(const Product<T>& a, bool strided, int threads) {
  long x_size = whole_lines(TOKENS * a.b2 * a.q), z_size = whole_lines(a.b1 * a.b2 * TOKENS * a.r);
  long own = whole_lines(a.b2 * TOKENS * W);
  float* x = scratch(x_size + z_size + threads * own);
  float *z = x + x_size, *rests = z + z_size;
  split_columns(a, 0, TOKENS, {0, TOKENS}, x, a.q);
  in_parallel(threads, [&](int thread, int threads, auto barrier) {
    Range blocks = share(a.b1 * a.b2, 1, thread, threads);
    std::fill(z + blocks.from * TOKENS * a.r, z + blocks.to * TOKENS * a.r, 0.0f);
    for (long ij = blocks.from; ij < blocks.to; ++ij) {
      const float* xj = x + ij % a.b2 * TOKENS * a.q;
      const T* v = a.V + ij * a.q * a.r;
      float* to = z + ij * TOKENS * a.r;
      add_all_rows<TOKENS>(a.q, a.r, xj, a.q, v, a.r, to);
    }
    barrier();
    Segments segments{a.b2, a.r, a.p * a.r, TOKENS * a.r};
    Range rows = share(a.b1 * a.p, W, thread, threads);
    for (long row = rows.from, end; row < rows.to; row = end) {
      long i = row / a.p, l = row % a.p;
      end = std::min(rows.to, (i + 1) * a.p);
      left_block<TOKENS>(end - row, a.r, segments, a.U + (i * a.b2 * a.p + l) * a.r,
                         z + i * a.b2 * TOKENS * a.r, rests + thread * own,
                         [&](long k, int t, float value) {
                           long shown = shown_row(a, strided, i, l + k);
                           if (shown < a.out_features) put(a.y + t * a.out_features + shown, value);
                         });
    }
  });
}

// The rows of U_i., all its blocks side by side, times z_i. (tokens, b2 blocks of `wide`).
template <class T>
void left_tile_of_blocks(const Product<T>& a, long tokens, long i, long row, long count,
                         const float* z, long ldz, long wide, float* panels, float* out) {
  long together = std::max(1L, DEPTH / wide);  // thin blocks are packed side by side
  for (long j = 0; j < a.b2; j += together) {
    long blocks = std::min(together, a.b2 - j);
    for (long k = 0; k < a.r; k += DEPTH) {
      long depth = std::min(long(DEPTH), a.r - k), whole = blocks > 1 ? blocks * wide : depth;
      if (blocks > 1) std::fill_n(panels, PANEL * whole, 0.0f);  // what lies between thin blocks
      for (long s = 0; s < blocks; ++s)
        pack_transposed(depth, count,
                        Rows<T>{a.U + ((i * a.b2 + j + s) * a.p + row) * a.r + k, a.r},
                        panels + s * wide * PANEL, whole);
      multiply(tokens, count, whole, z + j * wide + k, ldz, panels, out, ROW_TILE, j + k > 0);
    }
  }
}

template <class T>
void left_panels_of_blocks(const Product<T>& a, bool strided, long first, long tokens, Range units,
                           const float* z, long ldz, long wide, float* panels, float* out) {
  long per_block = panels_of(a.p);
  for (long unit = units.from; unit < units.to; ++unit) {
    long i = unit / per_block, row = unit % per_block * PANEL, count = std::min(long(PANEL), a.p - row);
    left_tile_of_blocks(a, tokens, i, row, count, z + i * tokens * ldz, ldz, wide, panels, out);
    for (long c = 0; c < count; ++c) {
      long shown = shown_row(a, strided, i, row + c);
      for (long t = 0; shown < a.out_features && t < tokens; ++t)
        put(a.y + (first + t) * a.out_features + shown, out[t * ROW_TILE + c]);
    }
  }
}

template <class T>
void many_tokens_of_blocks(const Product<T>& a, bool strided, int threads) {
  if (worth_apart(a, threads))
    return apart(a, threads,
                 [&](const Product<T>& part) { many_tokens_of_blocks(part, strided, 1); });
  long chunk = even_chunk(a.tokens), wide = (a.r + W - 1) / W * W;
  long ldz = row_stride(a.b2 * wide);
  size_t x_size = chunk * a.b2 * row_stride(a.q), z_size = a.b1 * chunk * ldz + PANEL;
  size_t out_size = chunk * ROW_TILE, panel_size = 2 * DEPTH * (whole_lines(a.r) + 2 * PANEL);
  float* copy = scratch(x_size + z_size + threads * (out_size + panel_size));
  float *z = copy + x_size, *rest = z + z_size;
  in_parallel(threads, [&](int thread, int threads, auto barrier) {
    float *out = rest + thread * (out_size + panel_size), *panels = out + out_size;
    long units = a.b1 * panels_of(a.p);
    for (long first = 0; first < a.tokens; first += chunk) {
      long tokens = std::min(chunk, a.tokens - first);
      Inputs x = inputs_of(a, first, tokens, thread, threads, copy);
      barrier();
      Range blocks = share(a.b1 * a.b2, 1, thread, threads);
      for (long ij = blocks.from; ij < blocks.to; ++ij)
        for (long k = 0; k < a.q; k += DEPTH) {
          long i = ij / a.b2, j = ij % a.b2, depth = std::min(long(DEPTH), a.q - k);
          pack(depth, a.r, a.V + (ij * a.q + k) * a.r, a.r, panels);
          multiply(tokens, a.r, depth, x.first + j * x.next + k, x.stride, panels,
                   z + i * tokens * ldz + j * wide, ldz, k > 0);
        }
      barrier();
      left_panels_of_blocks(a, strided, first, tokens, share(units, 1, thread, threads), z, ldz, wide,
                            panels, out);
      barrier();
    }
  });
}
