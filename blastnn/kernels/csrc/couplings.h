// What the alternating solver does with couplings, for all pairs of a block row i and a block column j
// at once; nothing of pairs times r^2 numbers is ever written down.
#pragma once

#include <limits>

#include "product.h"

// Conjugate gradients for W s = b with W = own_i * gram_j, elementwise.
struct Couplings {
  long problems, b1, b2, r;
  int steps;
  const float* own;    // (problems, b1, r, r), symmetric
  const float* gram;   // (problems, b2, r, r), symmetric
  const float* right;  // (problems, b1, b2, r)
  const float* start;  // (problems, b1, b2, r)
  float* s;            // (problems, b1, b2, r)
};

inline float dot(const float* a, const float* b, long r) {
  Vec lanes{};
  float rest = 0.0f;
  long k = 0;
  for (; k + W <= r; k += W) add(lanes, load(a + k), load(b + k));
  for (; k < r; ++k) add(rest, a[k], b[k]);
  return sum_of(lanes) + rest;
}

// total += a * b, elementwise
inline void add_product(const float* a, const float* b, float* total, long r) {
  long k = 0;
  for (; k + W <= r; k += W) {
    Vec sum = load(total + k);
    add(sum, load(a + k), load(b + k));
    store(total + k, sum);
  }
  for (; k < r; ++k) add(total[k], a[k], b[k]);
}

// y = (own * gram) x
inline void times(const float* own, const float* gram, const float* x, float* y, long r) {
  for (long t = 0; t < r; ++t, own += r, gram += r) {
    Vec even{}, odd{};
    float rest = 0.0f;
    long k = 0;
    for (; k + 2 * W <= r; k += 2 * W) {
      add(even, load(own + k) * load(gram + k), load(x + k));
      add(odd, load(own + k + W) * load(gram + k + W), load(x + k + W));
    }
    for (; k + W <= r; k += W) add(even, load(own + k) * load(gram + k), load(x + k));
    for (; k < r; ++k) add(rest, own[k] * gram[k], x[k]);
    y[t] = sum_of(even + odd) + rest;
  }
}

// One pair, preconditioned with the diagonal, as `descend` in normal_equations.py; `memory` is 5 r.
inline void descend(const Couplings& a, long pair, float* memory) {
  constexpr float tiny = std::numeric_limits<float>::min();
  long r = a.r, row = pair / a.b2, problem = row / a.b1;
  const float* own = a.own + row * r * r;
  const float* gram = a.gram + (problem * a.b2 + pair % a.b2) * r * r;
  float *scale = memory, *residual = memory + r, *z = memory + 2 * r, *direction = memory + 3 * r,
        *product = memory + 4 * r, *x = a.s + pair * r;
  std::copy_n(a.start + pair * r, r, x);
  times(own, gram, x, product, r);
  for (long k = 0; k < r; ++k) {
    scale[k] = 1.0f / std::max(own[k * r + k] * gram[k * r + k], tiny);
    residual[k] = a.right[pair * r + k] - product[k];
    direction[k] = z[k] = scale[k] * residual[k];
  }
  float inner = dot(residual, z, r);
  for (int count = 1; count <= a.steps; ++count) {
    times(own, gram, direction, product, r);
    float curvature = dot(direction, product, r);
    float length = curvature > tiny ? inner / curvature : 0.0f;
    for (long k = 0; k < r; ++k) add(x[k], length, direction[k]);
    if (count == a.steps) break;
    for (long k = 0; k < r; ++k) {
      add(residual[k], -length, product[k]);
      z[k] = scale[k] * residual[k];
    }
    float before = inner;
    inner = dot(residual, z, r);
    float share = before > tiny ? inner / before : 0.0f;
    for (long k = 0; k < r; ++k) direction[k] = std::fma(share, direction[k], z[k]);
  }
}

inline void descend_all(const Couplings& a, int threads) {
  in_parallel(threads, [&](int thread, int parts, auto) {
    Range mine = share(a.problems * a.b1 * a.b2, 1, thread, parts);
    float* memory = scratch(5 * a.r);
    for (long pair = mine.from; pair < mine.to; ++pair) descend(a, pair, memory);
  });
}

// A vector of r numbers for each problem, a and b; where it does not depend on one of them, or all are
// the same tensor, strides of 0 say so.
struct Scales {
  const float* first;
  long of_problem, of_a, of_b;

  const float* at(long problem, long a, long b) const {
    return first + problem * of_problem + a * of_a + b * of_b;
  }
};

// sum_b (left_ab right_ab^T) * gram_b for all a, added to the total or in its place.
struct WeightedGrams {
  long problems, a_count, b_count, r;
  const float* gram;  // (problems, b, r, r)
  Scales left, right;
  bool add;
  float* total;  // (problems, a, r, r)
};

// Row t of one of them.
inline void weigh_row(const WeightedGrams& a, long row, long t, float* to) {
  long r = a.r, problem = row / a.a_count, index = row % a.a_count;
  const float* gram = a.gram + (problem * a.b_count * r + t) * r;
  const float *left = a.left.at(problem, index, 0) + t, *right = a.right.at(problem, index, 0);
  long c = 0;
  for (; c + W <= r; c += W) {
    Vec sum = a.add ? load(to + c) : Vec{};
    for (long b = 0; b < a.b_count; ++b)
      add(sum, broadcast(left[b * a.left.of_b]) * load(right + b * a.right.of_b + c),
          load(gram + b * r * r + c));
    store(to + c, sum);
  }
  for (; c < r; ++c) {
    float sum = a.add ? to[c] : 0.0f;
    for (long b = 0; b < a.b_count; ++b)
      add(sum, left[b * a.left.of_b] * right[b * a.right.of_b + c], gram[b * r * r + c]);
    to[c] = sum;
  }
}

// Row by row of all grams, so that these are read once.
inline void weigh_all(const WeightedGrams& a, int threads) {
  in_parallel(threads, [&](int thread, int parts, auto) {
    Range mine = share(a.problems * a.r, 1, thread, parts);
    for (long k = mine.from; k < mine.to; ++k)
      for (long index = 0; index < a.a_count; ++index) {
        long row = k / a.r * a.a_count + index, t = k % a.r;
        weigh_row(a, row, t, a.total + (row * a.r + t) * a.r);
      }
  });
}

// sum_jt own_i[t, c] gram_j[t, c] s_ij[t] for all i: what all couplings of a row explain.
struct Explained {
  long problems, b1, b2, r;
  const float* own;   // (problems, b1, r, r)
  const float* gram;  // (problems, b2, r, r)
  Scales s;           // a is i, b is j
  float* sums;        // (problems, b1, r)
};

// Columns [c, c + width) of one row i, width at most W.
inline void explain_columns(const Explained& a, long row, long c, long width) {
  long r = a.r, problem = row / a.b1;
  const float *own = a.own + row * r * r + c, *gram = a.gram + problem * a.b2 * r * r + c;
  const float* s = a.s.at(problem, row % a.b1, 0);
  float* to = a.sums + row * r + c;
  if (width == W) {
    Vec sum{};
    for (long t = 0; t < r; ++t) {
      Vec coupled{};
      for (long j = 0; j < a.b2; ++j)
        add(coupled, broadcast(s[j * a.s.of_b + t]), load(gram + (j * r + t) * r));
      add(sum, coupled, load(own + t * r));
    }
    return store(to, sum);
  }
  for (long k = 0; k < width; ++k) {
    float sum = 0.0f;
    for (long t = 0; t < r; ++t) {
      float coupled = 0.0f;
      for (long j = 0; j < a.b2; ++j) add(coupled, s[j * a.s.of_b + t], gram[(j * r + t) * r + k]);
      add(sum, coupled, own[t * r + k]);
    }
    to[k] = sum;
  }
}

inline void explain_all(const Explained& a, int threads) {
  in_parallel(threads, [&](int thread, int parts, auto) {
    long pieces = (a.r + W - 1) / W;  // columns outside, so that those of the grams stay in cache
    Range mine = share(a.problems * pieces, 1, thread, parts);
    for (long k = mine.from; k < mine.to; ++k)
      for (long i = 0; i < a.b1; ++i) {
        long c = k % pieces * W;
        explain_columns(a, k / pieces * a.b1 + i, c, std::min(a.r - c, long(W)));
      }
  });
}

// X_ij = A_ij^T U_i of all pairs, larger than a cache: read once for each sum.
struct Products {
  long problems, b1, b2, q, r;
  const float* x;  // (problems, b1, b2, q, r)
};

// sums (problems, b1, b2, r) = sum over q of X_ij times the factors (problems, b2, q, r).
inline void sum_pairs(const Products& a, const float* factors, float* sums, int threads) {
  in_parallel(threads, [&](int thread, int parts, auto) {
    Range mine = share(a.problems * a.b1 * a.b2, 1, thread, parts);
    for (long pair = mine.from; pair < mine.to; ++pair) {
      long problem = pair / (a.b1 * a.b2);
      const float* x = a.x + pair * a.q * a.r;
      const float* v = factors + (problem * a.b2 + pair % a.b2) * a.q * a.r;
      float* to = sums + pair * a.r;
      std::fill_n(to, a.r, 0.0f);
      for (long row = 0; row < a.q; ++row, x += a.r, v += a.r) add_product(x, v, to, a.r);
    }
  });
}

// total (problems, b2, q, r) += sum over i of X_ij times the couplings (problems, b1, b2, r).
inline void add_weighted(const Products& a, const float* s, float* total, int threads) {
  in_parallel(threads, [&](int thread, int parts, auto) {
    Range mine = share(a.problems * a.b2 * a.q, 1, thread, parts);
    for (long k = mine.from; k < mine.to; ++k) {
      long row = k % a.q, j = k / a.q % a.b2, problem = k / (a.q * a.b2);
      for (long i = 0; i < a.b1; ++i) {
        long pair = (problem * a.b1 + i) * a.b2 + j;
        add_product(a.x + (pair * a.q + row) * a.r, s + pair * a.r, total + k * a.r, a.r);
      }
    }
  });
}
