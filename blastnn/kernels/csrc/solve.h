// Systems of normal equations, as the alternating solver has them (`factorize/als_state.py`):
// Cholesky factors of many small matrices, and many right sides solved with them.
//
// Both go by blocks of PANEL columns: what is left of a block after a product with those before (or
// behind) it, times the inverse of the block's own triangle. So all but the triangles themselves is
// the inner loop of panel.h; a library's solves reach a tenth of that for a few hundred numbers a
// side. L is lower triangular, G = L L^T, and solving x G = b by rows is z L^T = b, then x L = z.
#pragma once

#include <limits>

#include "panel.h"
#include "product.h"

constexpr int SOLVED_ROWS = 4 * MAX_ROWS;  // together, so that a panel is read from cache
constexpr long PACKED_FLOATS = 1 << 22;    // of packed triangles held at once, or one triangle

struct Systems {
  long count, rows, r;
  const float* lower;  // (count, r, r), row-major; what is above the diagonal is not read
  const float* right;  // (count, rows, r)
  float* x;            // (count, rows, r)
};

// Where the packed panels of one triangle are, in floats: for each block the panel of the columns
// before it, of those behind it, its inverse, and its inverse transposed.
struct PackedTriangle {
  long r;

  long blocks() const { return panels_of(r); }
  int width(long block) const { return int(std::min<long>(PANEL, r - block * PANEL)); }
  long stride() const { return PANEL * (r + 2 * PANEL); }
  long floats() const { return blocks() * stride(); }
  static long behind(long block) { return block * PANEL * PANEL; }
  long inverse() const { return r * PANEL; }
  long transposed() const { return (r + PANEL) * PANEL; }
};

// The inverse of a lower triangle (width x width), and its transpose: both PANEL x PANEL.
inline void invert(const float* lower, long ld, int width, float* inverse, float* transposed) {
  std::fill(inverse, inverse + PANEL * PANEL, 0.0f);
  std::fill(transposed, transposed + PANEL * PANEL, 0.0f);
  for (int t = 0; t < width; ++t) {
    Vec row[2] = {};
    row[t / W][t % W] = 1.0f;
    for (int k = 0; k < t; ++k) {
      Vec factor = broadcast(-lower[t * ld + k]);
      for (int v = 0; v < 2; ++v) add(row[v], factor, load(inverse + k * PANEL + v * W));
    }
    for (int v = 0; v < 2; ++v) store(inverse + t * PANEL + v * W, row[v] / lower[t * ld + t]);
    for (int c = 0; c <= t; ++c) transposed[c * PANEL + t] = inverse[t * PANEL + c];
  }
}

// left (rows, PANEL) = b - x panel: x are the `depth` columns solved before, with the stride of b.
inline void eliminate(int rows, int width, long depth, const float* x, const float* b, long ld,
                      const float* panel, float* left) {
  multiply_deep(rows, width, depth, x, ld, panel, left, PANEL);
  for (int t = 0; t < rows; ++t)
    for (int c = 0; c < PANEL; c += W) {
      float* to = left + t * PANEL + c;
      Vec was = c < width ? load(b + t * ld + c) : Vec{};
      store(to, depth ? was - load(to) : was);
    }
}

inline void pack_block(const PackedTriangle& triangle, const float* lower, long block, float* to) {
  long r = triangle.r, from = block * PANEL;
  int width = triangle.width(block), rest = int(r - from - width);
  Rows<float> rows{lower + from * r, r};
  if (from) pack_transposed(int(from), width, rows, to, int(from));
  if (rest)
    pack(rest, width, lower + (from + width) * r + from, r, to + triangle.behind(block));
  invert(lower + from * r + from, r, width, to + triangle.inverse(), to + triangle.transposed());
}

// Some rows of one system, in a buffer of SOLVED_ROWS * (row_stride(r) + PANEL).
inline void solve_some(const Systems& a, long system, long first, int rows, const float* packed,
                       float* buffer) {
  PackedTriangle triangle{a.r};
  long ld = row_stride(a.r), offset = (system * a.rows + first) * a.r;
  float* left = buffer + SOLVED_ROWS * ld;
  for (int t = 0; t < rows; ++t) {
    std::copy_n(a.right + offset + t * a.r, a.r, buffer + t * ld);
    std::fill(buffer + t * ld + a.r, buffer + (t + 1) * ld, 0.0f);
  }
  for (long block = 0; block < triangle.blocks(); ++block) {
    const float* panels = packed + block * triangle.stride();
    int width = triangle.width(block);
    float* b = buffer + block * PANEL;
    eliminate(rows, width, block * PANEL, buffer, b, ld, panels, left);
    multiply(rows, width, width, left, PANEL, panels + triangle.transposed(), b, ld, false);
  }
  for (long block = triangle.blocks() - 1; block >= 0; --block) {
    const float* panels = packed + block * triangle.stride();
    int width = triangle.width(block);
    long behind = block * PANEL + width;
    float* b = buffer + block * PANEL;
    eliminate(rows, width, a.r - behind, buffer + behind, b, ld, panels + triangle.behind(block),
              left);
    multiply(rows, width, width, left, PANEL, panels + triangle.inverse(), b, ld, false);
  }
  for (int t = 0; t < rows; ++t) std::copy_n(buffer + t * ld, a.r, a.x + offset + t * a.r);
}

// All systems, as many at a time as have room for their packed triangles.
inline void solve_systems(const Systems& a, int threads) {
  PackedTriangle triangle{a.r};
  long group = std::clamp(PACKED_FLOATS / triangle.floats(), 1L, a.count);
  long chunks = (a.rows + SOLVED_ROWS - 1) / SOLVED_ROWS;
  long buffer = whole_lines(SOLVED_ROWS * (row_stride(a.r) + PANEL));
  float* buffers = scratch(threads * buffer + group * triangle.floats());
  float* packed = buffers + threads * buffer;
  in_parallel(threads, [&](int thread, int parts, auto barrier) {
    for (long start = 0; start < a.count; start += group) {
      long systems = std::min(group, a.count - start);
      Range mine = share(systems * triangle.blocks(), 1, thread, parts);
      for (long k = mine.from; k < mine.to; ++k) {
        long system = k / triangle.blocks(), block = k % triangle.blocks();
        pack_block(triangle, a.lower + (start + system) * a.r * a.r, block,
                   packed + system * triangle.floats() + block * triangle.stride());
      }
      barrier();
      mine = share(systems * chunks, 1, thread, parts);
      for (long k = mine.from; k < mine.to; ++k) {
        long system = k / chunks, first = k % chunks * SOLVED_ROWS;
        solve_some(a, start + system, first, int(std::min<long>(SOLVED_ROWS, a.rows - first)),
                   packed + system * triangle.floats(), buffers + thread * buffer);
      }
      barrier();
    }
  });
}

struct Grams {
  long count, r;
  const float* gram;    // (count, r, r), symmetric
  const double* ridge;  // (problems), relative to the mean of a diagonal
  long of_each;         // matrices of one problem
  float* lower;         // (count, r, r), zeros above the diagonal
  bool* failed;         // (count): not positive definite; its factor is then of no use
};

// What is added to one diagonal: its problem's share of its mean, and a little more than nothing.
inline float lift_of(const Grams& a, long system) {
  double sum = 0.0;
  for (long t = 0; t < a.r; ++t) sum += a.gram[(system * a.r + t) * a.r + t];
  return float(sum / a.r * a.ridge[system / a.of_each]) + std::numeric_limits<float>::min();
}

// The factor of one block's own square (width x width of stride PANEL) in place; whether there is one.
inline bool factor_square(float* square, int width) {
  for (int t = 0; t < width; ++t) {
    float* row = square + t * PANEL;
    if (!(row[t] > 0.0f) || !std::isfinite(row[t])) return false;
    float root = std::sqrt(row[t]);
    // Row t of L^T is what is to the right of the diagonal: it is kept there while it is needed.
    for (int c = t; c < width; ++c) row[c] /= root;
    for (int s = t + 1; s < width; ++s) {
      Vec factor = broadcast(-row[s]);
      for (int c = s / W * W; c < PANEL; c += W) {
        Vec sum = load(square + s * PANEL + c);
        add(sum, factor, load(row + c));
        store(square + s * PANEL + c, sum);
      }
    }
  }
  for (int t = 0; t < width; ++t)
    for (int c = 0; c < t; ++c) square[t * PANEL + c] = square[c * PANEL + t];
  return true;
}

// The rows of L below and at one block, from those columns of L that are there already, by a team
// of threads. Memory of the team: 2 PANEL (r + PANEL).
template <class Barrier>
bool factor_block(const Grams& a, long system, float lift, long block, float* memory, int member,
                  int team, const Barrier& barrier) {
  PackedTriangle triangle{a.r};
  long r = a.r, from = block * PANEL;
  int width = triangle.width(block);
  float *lower = a.lower + system * r * r, *panel = memory, *left = panel + r * PANEL;
  float *inverse = left + r * PANEL, *transposed = inverse + PANEL * PANEL;
  const float* gram = a.gram + system * r * r;
  if (from && !member)
    pack_transposed(int(from), width, Rows<float>{lower + from * r, r}, panel, int(from));
  barrier();
  Range mine = share(r - from, MAX_ROWS, member, team);
  multiply_deep(int(mine.to - mine.from), width, from, lower + (from + mine.from) * r, r, panel,
                left + mine.from * PANEL, PANEL);
  for (long t = mine.from; t < mine.to; ++t)
    for (int c = 0; c < PANEL; ++c) {
      float value = c < width ? gram[(from + t) * r + from + c] : 0.0f;
      if (c == t) value += lift;
      left[t * PANEL + c] = from ? value - left[t * PANEL + c] : value;
    }
  barrier();
  if (!member) {
    a.failed[system] = !factor_square(left, width);
    invert(left, PANEL, width, inverse, transposed);
    for (int t = 0; t < width; ++t) {
      std::copy_n(left + t * PANEL, t + 1, lower + (from + t) * r + from);
      std::fill(lower + (from + t) * r + from + t + 1, lower + (from + t + 1) * r, 0.0f);
    }
  }
  barrier();
  // Below the last block, which alone can be narrower than a panel, there are no rows.
  mine = share(r - from - width, MAX_ROWS, member, team);
  if (mine.to > mine.from)
    multiply(int(mine.to - mine.from), width, width, left + (width + mine.from) * PANEL, PANEL,
             transposed, lower + (from + width + mine.from) * r + from, r, false);
  barrier();
  return !a.failed[system];
}

// Whole matrices to each thread where there are enough, else all threads to one after the other.
inline void factor_grams(const Grams& a, int threads) {
  long blocks = PackedTriangle{a.r}.blocks(), floats = whole_lines(2 * PANEL * (a.r + PANEL));
  float* memory = scratch(threads * floats);
  in_parallel(threads, [&](int thread, int parts, auto barrier) {
    bool alone = a.count >= parts;
    Range mine = alone ? share(a.count, 1, thread, parts) : Range{0, a.count};
    auto factor = [&](float* own, int member, int team, auto wait) {
      for (long system = mine.from; system < mine.to; ++system) {
        if (!member) a.failed[system] = false;
        float lift = lift_of(a, system);
        long block = 0;
        while (block < blocks && factor_block(a, system, lift, block, own, member, team, wait))
          ++block;
      }
    };
    alone ? factor(memory + thread * floats, 0, 1, [] {})
          : factor(memory, thread, parts, barrier);
  });
}
