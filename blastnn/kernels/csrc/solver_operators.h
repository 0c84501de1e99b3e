// The operators of solve.h and couplings.h that PyTorch sees.
#pragma once

#include "couplings.h"
#include "operators.h"
#include "solve.h"

// The Cholesky factors L of gram (k, ..., r, r), with ridge (k) times the mean of its diagonal added to
// that, and for which there is none.
inline std::tuple<at::Tensor, at::Tensor> factor(const at::Tensor& gram, at::ArrayRef<double> ridge) {
  int64_t dims = gram.dim();
  TORCH_CHECK(dims >= 3 && gram.size(-1) == gram.size(-2) && gram.size(0) == int64_t(ridge.size()) &&
                  gram.scalar_type() == at::kFloat,
              "blastnn::factor: the matrices and what is added to them do not fit together");
  at::Tensor gs = gram.contiguous();
  at::Tensor lower = at::empty(gs.sizes(), gs.options());
  at::Tensor failed = at::empty(gs.sizes().slice(0, dims - 2), gs.options().dtype(at::kBool));
  if (!lower.numel()) return {lower, failed.zero_()};
  int64_t count = failed.numel(), r = gram.size(-1);
  Grams grams{count, r, pointer<float>(gs), ridge.data(), count / gram.size(0),
              static_cast<float*>(lower.mutable_data_ptr()),
              static_cast<bool*>(failed.mutable_data_ptr())};
  factor_grams(grams, threads_for(count * r * r * r / 6));
  return {lower, failed};
}

// right (L L^T)^-1 by rows: lower L (..., r, r), right (..., rows, r).
inline at::Tensor solve_factored(const at::Tensor& lower, const at::Tensor& right) {
  int64_t dims = lower.dim(), r = right.size(-1);
  TORCH_CHECK(dims >= 2 && right.dim() == dims && lower.size(-1) == r && lower.size(-2) == r &&
                  lower.sizes().slice(0, dims - 2) == right.sizes().slice(0, dims - 2) &&
                  lower.scalar_type() == at::kFloat && right.scalar_type() == at::kFloat,
              "blastnn::solve_factored: the factor and the right side do not fit together");
  at::Tensor ls = lower.contiguous(), rs = right.contiguous();
  at::Tensor x = at::empty(rs.sizes(), rs.options());
  if (!x.numel()) return x;
  int64_t rows = right.size(-2), count = x.numel() / (rows * r);
  Systems systems{count, rows, r, pointer<float>(ls), pointer<float>(rs),
                  static_cast<float*>(x.mutable_data_ptr())};
  solve_systems(systems, threads_for(count * rows * r * r));
  return x;
}

// own (k, b1, r, r), gram (k, b2, r, r), right and start (k, b1, b2, r).
inline at::Tensor descend_couplings(const at::Tensor& own, const at::Tensor& gram, const at::Tensor& right,
                             const at::Tensor& start, int64_t steps) {
  bool fits = own.dim() == 4 && gram.dim() == 4 && right.sizes() == start.sizes();
  for (const at::Tensor& tensor : {own, gram, right, start})
    fits = fits && tensor.scalar_type() == at::kFloat;
  if (fits) {
    int64_t k = own.size(0), r = own.size(3);
    fits = own.size(2) == r && gram.sizes() == at::IntArrayRef{k, gram.size(1), r, r} &&
           right.sizes() == at::IntArrayRef{k, own.size(1), gram.size(1), r};
  }
  TORCH_CHECK(fits, "blastnn::descend_couplings: the Gram matrices and couplings do not fit together");
  at::Tensor os = own.contiguous(), gs = gram.contiguous(), rs = right.contiguous(),
             ss = start.contiguous();
  at::Tensor s = at::empty(rs.sizes(), rs.options());
  if (!s.numel()) return s;
  Couplings couplings{own.size(0), own.size(1), gram.size(1), own.size(3), int(steps),
                      pointer<float>(os), pointer<float>(gs), pointer<float>(rs),
                      pointer<float>(ss), static_cast<float*>(s.mutable_data_ptr())};
  descend_all(couplings, threads_for(s.numel() * own.size(3) * (steps + 1)));
  return s;
}

// Numbers (k, a, b, r) whose rows of r are whole; whatever else they are expanded from.
inline at::Tensor with_whole_rows(const at::Tensor& scales) {
  return scales.stride(3) == 1 || scales.size(3) == 1 ? scales : scales.contiguous();
}

inline Scales scales_of(const at::Tensor& scales) {
  return {pointer<float>(scales), scales.stride(0), scales.stride(1), scales.stride(2)};
}

// Whether gram (k, b, r, r) and scales (k, a, b, r) are float32 and fit together.
inline bool fits_grams(const at::Tensor& gram, const at::Tensor& scales) {
  if (gram.dim() != 4 || scales.dim() != 4 || gram.scalar_type() != at::kFloat ||
      scales.scalar_type() != at::kFloat)
    return false;
  int64_t k = scales.size(0), b = scales.size(2), r = scales.size(3);
  return gram.sizes() == at::IntArrayRef{k, b, r, r};
}

// sum_j (s_ij s_ij^T) * gram_j: gram (k, b2, r, r), couplings (k, b1, b2, r), to (k, b1, r, r).
inline at::Tensor weighted_grams(const at::Tensor& gram, const at::Tensor& couplings) {
  TORCH_CHECK(fits_grams(gram, couplings),
              "blastnn::weighted_grams: the Gram matrices and couplings do not fit together");
  at::Tensor gs = gram.contiguous(), ss = with_whole_rows(couplings);
  int64_t k = ss.size(0), b1 = ss.size(1), b2 = ss.size(2), r = ss.size(3);
  at::Tensor total = at::empty({k, b1, r, r}, gs.options());
  WeightedGrams grams{k, b1, b2, r, pointer<float>(gs), scales_of(ss), scales_of(ss), false,
                      static_cast<float*>(total.mutable_data_ptr())};
  weigh_all(grams, threads_for(ss.numel() * r));
  return total;
}

// total (k, a, r, r) += sum_b (left_ab right_ab^T) * gram_b: gram (k, b, r, r), the others (k, a, b, r).
inline void add_weighted_grams(const at::Tensor& gram, const at::Tensor& left, const at::Tensor& right,
                               at::Tensor& total) {
  bool fits = fits_grams(gram, left) && fits_grams(gram, right) && left.sizes() == right.sizes() &&
              total.is_contiguous() && total.scalar_type() == at::kFloat;
  if (fits) {
    int64_t r = left.size(3);
    fits = total.sizes() == at::IntArrayRef{left.size(0), left.size(1), r, r};
  }
  TORCH_CHECK(fits, "blastnn::add_weighted_grams: the Gram matrices and scales do not fit together");
  at::Tensor gs = gram.contiguous(), ls = with_whole_rows(left), rs = with_whole_rows(right);
  WeightedGrams grams{ls.size(0), ls.size(1), ls.size(2), ls.size(3), pointer<float>(gs),
                      scales_of(ls), scales_of(rs), true,
                      static_cast<float*>(total.mutable_data_ptr())};
  weigh_all(grams, threads_for(ls.numel() * ls.size(3)));
}

// sum_jt own_i[t, c] gram_j[t, c] s_ij[t]: own (k, b1, r, r), gram (k, b2, r, r), couplings
// (k, b1, b2, r), to (k, b1, r).
inline at::Tensor explained_by(const at::Tensor& own, const at::Tensor& gram,
                               const at::Tensor& couplings) {
  bool fits = fits_grams(gram, couplings) && own.dim() == 4 && own.scalar_type() == at::kFloat;
  if (fits) {
    int64_t r = gram.size(3);
    fits = own.sizes() == at::IntArrayRef{couplings.size(0), couplings.size(1), r, r};
  }
  TORCH_CHECK(fits, "blastnn::explained_by: the Gram matrices and couplings do not fit together");
  at::Tensor os = own.contiguous(), gs = gram.contiguous(), ss = with_whole_rows(couplings);
  int64_t k = ss.size(0), b1 = ss.size(1), b2 = ss.size(2), r = ss.size(3);
  at::Tensor sums = at::empty({k, b1, r}, os.options());
  Explained explained{k, b1, b2, r, pointer<float>(os), pointer<float>(gs), scales_of(ss),
                      static_cast<float*>(sums.mutable_data_ptr())};
  explain_all(explained, threads_for(ss.numel() * r));
  return sums;
}

// diag(X_ij^T V_j): products X (k, b1, b2, q, r), factors V (k, b2, q, r), to (k, b1, b2, r).
inline at::Tensor paired_sums(const at::Tensor& products, const at::Tensor& factors) {
  bool fits = products.dim() == 5 && factors.scalar_type() == at::kFloat &&
              products.scalar_type() == at::kFloat &&
              factors.sizes() == at::IntArrayRef{products.size(0), products.size(2),
                                                 products.size(3), products.size(4)};
  TORCH_CHECK(fits, "blastnn::paired_sums: the products and the factors do not fit together");
  at::Tensor xs = products.contiguous(), vs = factors.contiguous();
  int64_t k = xs.size(0), b1 = xs.size(1), b2 = xs.size(2), q = xs.size(3), r = xs.size(4);
  at::Tensor sums = at::empty({k, b1, b2, r}, xs.options());
  Products sizes{k, b1, b2, q, r, pointer<float>(xs)};
  sum_pairs(sizes, pointer<float>(vs), static_cast<float*>(sums.mutable_data_ptr()),
            threads_for(xs.numel()));
  return sums;
}

// total (k, b2, q, r) += sum_i X_ij diag(s_ij): products X (k, b1, b2, q, r), couplings (k, b1, b2, r).
inline void add_coupled(const at::Tensor& products, const at::Tensor& couplings, at::Tensor& total) {
  bool fits = products.dim() == 5 && couplings.dim() == 4 && total.is_contiguous();
  for (const at::Tensor& tensor : {products, couplings, total})
    fits = fits && tensor.scalar_type() == at::kFloat;
  if (fits) {
    int64_t k = products.size(0), b2 = products.size(2), r = products.size(4);
    fits = couplings.sizes() == at::IntArrayRef{k, products.size(1), b2, r} &&
           total.sizes() == at::IntArrayRef{k, b2, products.size(3), r};
  }
  TORCH_CHECK(fits, "blastnn::add_coupled: the products and the couplings do not fit together");
  at::Tensor xs = products.contiguous(), ss = couplings.contiguous();
  Products sizes{xs.size(0), xs.size(1), xs.size(2), xs.size(3), xs.size(4), pointer<float>(xs)};
  add_weighted(sizes, pointer<float>(ss), static_cast<float*>(total.mutable_data_ptr()),
               threads_for(xs.numel()));
}
