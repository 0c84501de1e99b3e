// More than a few tokens: chunks of tokens, whose stages go through packed panels.
//
// For a chunk, a thread takes a range of the rank, panel by panel: z_j = V_j^T x_j for all j, then
// w_i = sum_j s_ij z_j while z is still in its cache; after a barrier it takes panels of output
// rows, y_i = U_i w_i. No tensor of b1 b2 T r numbers, and every weight is packed once a chunk.
#pragma once

#include <type_traits>

#include "panel.h"
#include "product.h"

constexpr long CHUNK = 256;             // tokens
constexpr long MANY = 128;              // tokens that a thread can be busy with by itself
constexpr long OWN = 384 * 1024;        // floats of w that every thread may have for itself
constexpr long CACHE = 64 * 1024;       // floats of z that a thread works on at a time
constexpr long ROW_TILE = 4 * PANEL;    // output rows between two packings

// ROWS block rows of w for TOKENS tokens and a panel of columns, which fills whole cache lines.
// z is (b2, ., ldz), s (b1, b2, PANEL) of floats.
template <int ROWS, int TOKENS>
inline void couple_few(long b2, const float* s, const float* z, long ldz, long next_column, float* w,
                       long ldw, long next_row) {
  Vec total[ROWS][TOKENS][2] = {};
  for (long j = 0; j < b2; ++j) {
    Vec couplings[ROWS][2];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) couplings[i][v] = load(s + (i * b2 + j) * PANEL + v * W);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        Vec zs = load(z + j * next_column + t * ldz + v * W);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) add(total[i][t][v], couplings[i][v], zs);
      }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) store(w + i * next_row + t * ldw + v * W, total[i][t][v]);
}

template <int TOKENS>
inline void couple_all_rows(long b1, long b2, const float* s, const float* z, long ldz,
                            long next_column, float* w, long ldw, long next_row) {
  long i = 0;
  for (; i + 2 <= b1; i += 2)
    couple_few<2, TOKENS>(b2, s + i * b2 * PANEL, z, ldz, next_column, w + i * next_row, ldw,
                          next_row);
  if (i < b1)
    couple_few<1, TOKENS>(b2, s + i * b2 * PANEL, z, ldz, next_column, w + i * next_row, ldw,
                          next_row);
}

// w_i = sum_j s_ij z_j over the columns `rank`; z is (b2, tokens, ldz), w (b1, tokens, ldw).
template <class T>
void couple_tile(const Product<T>& a, long tokens, Range rank, const float* z, long ldz, float* w,
                 long ldw, float* s) {
  for (long c = rank.from; c < rank.to; c += PANEL) {
    long width = std::min(long(PANEL), rank.to - c);
    pack(a.b1 * a.b2, width, a.S + c, a.r, s);
    const float* zc = z + c - rank.from;
    long t = 0;
    for (; t + 3 <= tokens; t += 3) {
      // w is written for the first time here: its lines are on their way before they are needed.
      for (long i = 0; i < a.b1; ++i)
        for (int k = 0; k < 3; ++k) __builtin_prefetch(w + (i * tokens + t + 3 + k) * ldw + c, 1);
      couple_all_rows<3>(a.b1, a.b2, s, zc + t * ldz, ldz, tokens * ldz, w + t * ldw + c, ldw,
                         tokens * ldw);
    }
    for (; t < tokens; ++t)
      couple_all_rows<1>(a.b1, a.b2, s, zc + t * ldz, ldz, tokens * ldz, w + t * ldw + c, ldw,
                         tokens * ldw);
  }
}

// Input tokens in float32, cut at block columns: column j of token t at first + j next + t stride.
struct Inputs {
  const float* first;
  long next, stride;
};

// The inputs of tokens [first, first + count), shared out to `threads`, copied to `to` in a better
// layout; float32 inputs whose rows do not meet in one cache set are read where they are.
template <class T>
Inputs inputs_of(const Product<T>& a, long first, long count, int thread, int threads, float* to) {
  if constexpr (std::is_same_v<T, float>)
    if (a.in_features == a.b2 * a.q && a.in_features % 1024)
      return {a.x + first * a.in_features, a.q, a.in_features};
  long stride = row_stride(a.q);
  split_columns(a, first, count, share(count, 1, thread, threads), to, stride);
  return {to, count * stride, stride};
}

// z_j for all j, then w, over the columns `rank`.
template <class T, class Factors>
void right_and_couple_tile(const Product<T>& a, const Factors& factors, long tokens, Range rank,
                           const Inputs& x, float* z, float* panels, float* w, long ldw) {
  long width = rank.to - rank.from, ldz = panels_of(width) * PANEL;
  for (long j = 0; j < a.b2; ++j)
    for (long k = 0; k < a.q; k += DEPTH) {
      long rows = std::min(long(DEPTH), a.q - k);
      factors.pack_right(j, k, rows, rank, panels);
      multiply(tokens, width, rows, x.first + j * x.next + k, x.stride, panels,
               z + j * tokens * ldz, ldz, k > 0);
    }
  if (a.S) return couple_tile(a, tokens, rank, z, ldz, w, ldw, panels);
  for (long t = 0; t < tokens; ++t)
    std::copy(z + t * ldz, z + t * ldz + width, w + t * ldw + rank.from);
}

// y_i = U_i w_i for `count` rows of block row i from row `row` of it on: straight into y in float32;
// what must be rounded by way of `out`.
template <class T, class Factors>
void left_tile(const Product<T>& a, const Factors& factors, long first, long tokens, long i,
               long row, long count, const float* w, long ldw, float* panels, float* out) {
  long shown = std::min(count, a.out_features - (i * a.p + row));
  if (shown <= 0) return;
  T* y = a.y + first * a.out_features + i * a.p + row;
  constexpr bool straight = std::is_same_v<T, float>;
  float* to = straight ? reinterpret_cast<float*>(y) : out;
  long stride = straight ? a.out_features : ROW_TILE;
  for (long k = 0; k < a.r; k += DEPTH) {
    long depth = std::min(long(DEPTH), a.r - k);
    factors.pack_left(i, row, count, k, depth, panels);
    multiply(tokens, shown, depth, w + i * tokens * ldw + k, ldw, panels, to, stride, k > 0, straight);
  }
  for (long t = 0; !straight && t < tokens; ++t)
    for (long c = 0; c < shown; ++c) put(y + t * a.out_features + c, out[t * ROW_TILE + c]);
}

template <class T, class Factors>
void left_panels(const Product<T>& a, const Factors& factors, long first, long tokens,
                 Range panels_of_all, const float* w, long ldw, float* panels, float* out) {
  long per_block = panels_of(a.p);
  for (long unit = panels_of_all.from; unit < panels_of_all.to;) {
    long i = unit / per_block, panel = unit % per_block;
    long end = std::min({panels_of_all.to - i * per_block, per_block, panel + ROW_TILE / PANEL});
    long row = panel * PANEL, count = std::min(end * PANEL, a.p) - row;
    left_tile(a, factors, first, tokens, i, row, count, w, ldw, panels, out);
    unit += end - panel;
  }
}

// Tokens to a chunk: of at most CHUNK or little more, as equal as whole micro-kernels allow.
inline long even_chunk(long tokens) {
  long chunks = (tokens + CHUNK - 1) / CHUNK;
  return ((tokens + chunks - 1) / chunks + MAX_ROWS - 1) / MAX_ROWS * MAX_ROWS;
}

// Whether each thread should take tokens of its own: nobody waits, and packing every weight once more
// costs little where they are many. But then each has its own w, which must not crowd the cache.
template <class T>
bool worth_apart(const Product<T>& a, int threads) {
  return threads > 1 && a.tokens >= MANY * threads && a.b1 * CHUNK * a.r <= OWN;
}

template <class T, class Multiply>
void apart(const Product<T>& a, int threads, const Multiply& multiply) {
  in_parallel(threads, [&](int thread, int threads, auto) {
    Range tokens = share(a.tokens, MAX_ROWS, thread, threads);
    Product<T> part = a;
    part.tokens = tokens.to - tokens.from;
    part.x += tokens.from * a.in_features, part.y += tokens.from * a.out_features;
    if (part.tokens) multiply(part);
  });
}

// The `tile` columns from `from` on, and one vector more if that is all there is behind them.
inline Range next_tile(long from, long to, long tile) {
  return {from, to - from <= tile + W ? to : from + tile};
}

template <class T, class Factors>
void many_tokens(const Product<T>& a, const Factors& factors, int threads) {
  if (worth_apart(a, threads))
    return apart(a, threads, [&](const Product<T>& part) { many_tokens(part, factors, 1); });
  long chunk = even_chunk(a.tokens);
  long ldw = row_stride(panels_of(a.r) * PANEL);
  long tile = std::clamp(CACHE / (a.b2 * chunk) / PANEL, 1L, 32L) * PANEL;
  size_t x_size = chunk * a.b2 * row_stride(a.q), w_size = a.b1 * chunk * ldw;
  size_t z_size = a.b2 * chunk * (tile + PANEL), out_size = chunk * ROW_TILE;
  size_t panel_size = std::max({DEPTH * ROW_TILE, DEPTH * (tile + PANEL), a.b1 * a.b2 * PANEL});
  size_t own = z_size + out_size + panel_size;
  float* copy = scratch(x_size + w_size + threads * own);
  float *w = copy + x_size, *rest = w + w_size;
  in_parallel(threads, [&](int thread, int threads, auto barrier) {
    float *z = rest + thread * own, *out = z + z_size, *panels = out + out_size;
    long units = a.b1 * panels_of(a.p);
    for (long first = 0; first < a.tokens; first += chunk) {
      long tokens = std::min(chunk, a.tokens - first);
      Inputs x = inputs_of(a, first, tokens, thread, threads, copy);
      barrier();
      Range rank = share(a.r, PANEL, thread, threads);
      for (Range some{rank.from, rank.from}; some.to < rank.to;) {
        some = next_tile(some.to, rank.to, tile);
        right_and_couple_tile(a, factors, tokens, some, x, z, panels, w, ldw);
      }
      barrier();
      left_panels(a, factors, first, tokens, share(units, 1, thread, threads), w, ldw, panels, out);
      barrier();
    }
  });
}
