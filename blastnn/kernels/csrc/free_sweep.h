// One sweep of the alternating solver without data (`factorize/als_free.py` tells what each step is):
// in one call, because of a small matrix the calls of forty operators take longer than they do.
#pragma once

#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <vector>

#include "solver_operators.h"

// exact = old + omega (exact - old), in place, with an omega for each problem: both (k, ...). As
// torch.lerp has it, so that an omega of 1 changes no bit.
inline void relax(at::Tensor& exact, const at::Tensor& old, at::ArrayRef<double> omega) {
  at::Tensor before = old.contiguous();
  long of_each = exact.numel() / long(omega.size());
  float* to = static_cast<float*>(exact.mutable_data_ptr());
  const float* from = pointer<float>(before);
  for (double each : omega) {
    float step = 1.0f - float(each);
    for (long k = 0; k < of_each; ++k) to[k] = to[k] - step * (to[k] - from[k]);
    to += of_each, from += of_each;
  }
}

// The diagonals of gram (k, ..., r, r) are to be 1 + penalty times as large, a penalty for each problem.
inline void lift(at::Tensor& gram, at::ArrayRef<double> penalty) {
  long r = gram.size(-1), of_each = gram.numel() / (r * r * long(penalty.size()));
  float* to = static_cast<float*>(gram.mutable_data_ptr());
  for (double each : penalty)
    for (long matrix = 0; matrix < of_each; ++matrix, to += r * r)
      for (long t = 0; t < r; ++t) to[t * r + t] *= 1.0f + float(each);
}

// right G^-1 by rows, with a ridge for each problem; whether a matrix was not positive definite.
inline std::pair<at::Tensor, bool> solved(const at::Tensor& gram, const at::Tensor& right,
                                          at::ArrayRef<double> ridge) {
  auto [lower, failed] = factor(gram, ridge);
  const bool* flags = pointer<bool>(failed);
  bool any = std::any_of(flags, flags + failed.numel(), [](bool flag) { return flag; });
  return {solve_factored(lower, right), any};
}

// tr(X G X^T) - 2 <R, X> of each problem: X and R (k, blocks, rows, r), G (k, blocks, r, r).
inline at::Tensor objective(const at::Tensor& x, const at::Tensor& gram, const at::Tensor& right) {
  at::Tensor rows = x.flatten(0, 1);
  at::Tensor slope = at::baddbmm(right.flatten(0, 1), rows, gram.flatten(0, 1), -2);
  at::Tensor values = at::empty({x.size(0)}, x.options().dtype(at::kDouble));
  const float *left = pointer<float>(slope), *with = pointer<float>(rows);
  double* to = static_cast<double*>(values.mutable_data_ptr());
  long of_each = x.numel() / x.size(0);
  for (long problem = 0; problem < x.size(0); ++problem, left += of_each, with += of_each) {
    double sum = 0.0;
    for (long k = 0; k < of_each; ++k) sum += double(left[k] * with[k]);
    to[problem] = sum;
  }
  return values;
}

// sum_t G_tt |x_t|^2 of each problem, with the arguments of `objective`.
inline at::Tensor explained_apart(const at::Tensor& x, const at::Tensor& gram) {
  at::Tensor values = at::empty({x.size(0)}, x.options().dtype(at::kDouble));
  const float *with = pointer<float>(x), *diagonal = pointer<float>(gram);
  double* to = static_cast<double*>(values.mutable_data_ptr());
  long r = x.size(3);
  for (long problem = 0; problem < x.size(0); ++problem) {
    double sum = 0.0;
    for (long block = 0; block < x.size(1); ++block, diagonal += r * r)
      for (long row = 0; row < x.size(2); ++row, with += r)
        for (long t = 0; t < r; ++t) sum += double(with[t] * with[t] * diagonal[t * r + t]);
    to[problem] = sum;
  }
  return values;
}

// rows (k, b1, p, b2 q), U (k, b1, p, r), S (k, b1, b2, r), V (k, b2, q, r), omega and penalty (k): the
// new factors, the objective but for a constant (k), its sum over the lifted diagonal alone (k), and
// whether a normal matrix was not positive definite, which makes them worthless.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, bool> sweep_freely(
    const at::Tensor& rows, const at::Tensor& U, const at::Tensor& S, const at::Tensor& V,
    at::ArrayRef<double> omega, at::ArrayRef<double> penalty, double smallest,
    int64_t coupling_steps) {
  bool fits = rows.dim() == 4 && U.dim() == 4 && S.dim() == 4 && V.dim() == 4 && rows.numel();
  for (const at::Tensor& tensor : {rows, U, S, V})
    fits = fits && tensor.scalar_type() == at::kFloat;
  if (fits) {
    int64_t k = rows.size(0), b1 = rows.size(1), b2 = V.size(1), r = V.size(3);
    fits = U.sizes() == at::IntArrayRef{k, b1, rows.size(2), r} && r > 0 &&
           S.sizes() == at::IntArrayRef{k, b1, b2, r} && V.size(0) == k &&
           rows.size(3) == b2 * V.size(2) && omega.size() == size_t(k) && penalty.size() == size_t(k);
  }
  TORCH_CHECK(fits, "blastnn::sweep_freely: the matrices and the factors do not fit together");
  // Products here must have the dtype that is written into their memory, autocast or not.
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  int64_t k = V.size(0), b1 = U.size(1), b2 = V.size(1), p = U.size(2), q = V.size(2), r = V.size(3);
  at::Tensor a = rows.flatten(0, 1), v = V.contiguous().flatten(0, 1), s = S.contiguous();

  std::vector<double> ridge(size_t(k), smallest);
  at::Tensor gram = at::bmm(v.mT(), v).view({k, b2, r, r});
  lift(gram, penalty);
  at::Tensor scaled = at::mul(v.view({k, 1, b2, q, r}), s.unsqueeze(3)).view({k * b1, b2 * q, r});
  at::Tensor right = at::bmm(a, scaled).view({k, b1, p, r});
  auto [left, left_failed] = solved(weighted_grams(gram, s), right, ridge);
  relax(left, U, omega);

  at::Tensor u = left.flatten(0, 1);
  at::Tensor products = at::bmm(a.mT(), u).view({k, b1, b2, q, r});
  at::Tensor own = at::bmm(u.mT(), u).view({k, b1, r, r});
  at::Tensor couplings =
      descend_couplings(own, gram, paired_sums(products, V), s, coupling_steps);
  relax(couplings, s, omega);

  at::Tensor total = at::zeros_like(V, at::MemoryFormat::Contiguous);
  add_coupled(products, couplings, total);
  at::Tensor normal = weighted_grams(own, couplings.transpose(1, 2));
  lift(normal, penalty);
  auto [found, found_failed] = solved(normal, total, ridge);
  relax(found, V, omega);
  return {left, couplings, found, objective(found, normal, total), explained_apart(found, normal),
          left_failed || found_failed};
}
