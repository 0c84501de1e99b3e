// The operators that PyTorch sees: those of products here, and the list of all.
#include <torch/library.h>

#include "attention_operator.h"
#include "block_low_rank.h"
#include "free_sweep.h"
#include "gated.h"
#include "operators.h"
#include "quantized.h"
#include "solver_operators.h"

namespace {

// few(N) for N tokens of which there is a kernel of their own, many() for more.
template <class Few, class Many>
void by_tokens(long tokens, const Few& few, const Many& many) {
  switch (tokens) {
    case 0: return;
    case 1: return few(std::integral_constant<int, 1>{});
    case 2: return few(std::integral_constant<int, 2>{});
    case 3: return few(std::integral_constant<int, 3>{});
    case 4: return few(std::integral_constant<int, 4>{});
    default: return many();
  }
}

template <class T, class Factors>
void run(const Product<T>& a, const Factors& factors) {
  int threads = threads_for(a.tokens * a.r * (a.b1 * a.p + a.b2 * a.q));
  by_tokens(
      a.tokens, [&](auto tokens) { few_tokens<tokens()>(a, factors, threads); },
      [&] { many_tokens(a, factors, threads); });
}

template <class T>
void run_blocks(const Product<T>& a, bool strided) {
  int threads = threads_for(a.tokens * a.r * a.b1 * a.b2 * (a.p + a.q));
  by_tokens(
      a.tokens, [&](auto tokens) { few_tokens_of_blocks<tokens()>(a, strided, threads); },
      [&] { many_tokens_of_blocks(a, strided, threads); });
}

// A product without its sizes of blocks: what both operators have in common.
template <class T>
Product<T> product_of(const at::Tensor& x, const at::Tensor& U, const at::Tensor& V,
                      at::Tensor& y) {
  Product<T> a{};
  a.in_features = x.size(-1), a.out_features = y.size(-1);
  a.tokens = a.out_features ? y.numel() / a.out_features : 0;
  a.p = U.size(-2), a.q = V.size(-2), a.r = U.size(-1);
  a.x = pointer<T>(x), a.U = pointer<T>(U), a.V = pointer<T>(V);
  a.y = static_cast<T*>(y.mutable_data_ptr());
  return a;
}

// run(T) for the type that the numbers have.
template <class Run>
void by_type(const at::Tensor& x, const Run& run) {
  x.scalar_type() == at::kFloat ? run(float{}) : run(BFloat16{});
}

// Whether y (..., m) can take the rows of x (..., n).
bool is_output(const at::Tensor& y, const at::Tensor& x) {
  return x.dim() && y.dim() == x.dim() && y.is_contiguous() &&
         y.scalar_type() == x.scalar_type() && y.sizes().slice(0, y.dim() - 1) ==
         x.sizes().slice(0, x.dim() - 1);
}

// The blocks of a factor (blocks, p, r); (p, r), a factor of a low-rank matrix, is one block.
int64_t blocks_of(const at::Tensor& factor) { return factor.dim() == 3 ? factor.size(0) : 1; }

bool is_factor(const at::Tensor& factor, int64_t features) {
  return (factor.dim() == 2 || factor.dim() == 3) && features <= blocks_of(factor) * factor.size(-2);
}

// x (..., n), U (b1, p, r), S (b1, b2, r) or none, V (b2, q, r) into y (..., m).
void blast_into(const at::Tensor& x, const at::Tensor& U, const std::optional<at::Tensor>& S,
                const at::Tensor& V, at::Tensor& y) {
  bool fits = is_output(y, x) && is_factor(U, y.size(-1)) && is_factor(V, x.size(-1)) &&
              U.size(-1) == V.size(-1);
  if (fits && S) fits = S->sizes() == at::IntArrayRef{blocks_of(U), blocks_of(V), U.size(-1)};
  TORCH_CHECK(fits, "blastnn::blast: the input and the factors do not fit together");
  at::Tensor xs = x.contiguous(), us = U.contiguous(), vs = V.contiguous(),
             ss = S ? S->contiguous() : at::Tensor();
  by_type(x, [&](auto number) {
    auto a = product_of<decltype(number)>(xs, us, vs, y);
    a.b1 = blocks_of(U), a.b2 = blocks_of(V);
    a.S = S ? pointer<decltype(number)>(ss) : nullptr;
    run(a, PlainFactors<decltype(number)>{a});
  });
}

template <int BITS, class T>
void run_quantized(const Product<T>& a, const at::Tensor& U, const at::Tensor& U_scale,
                   const at::Tensor& V, const at::Tensor& V_scale, long group) {
  auto bytes = [](const at::Tensor& tensor) {
    return Packed<BITS>{static_cast<const uint8_t*>(tensor.const_data_ptr())};
  };
  run(a, QuantizedFactors<BITS, T>{a, bytes(U), bytes(V), pointer<BFloat16>(U_scale),
                                   pointer<BFloat16>(V_scale), group, U.size(-1) * 8 / BITS});
}

// The same with U (b1, p, r) and V (b2, q, r) of whole numbers, two to a byte where `bits` is 4,
// and their scales (b1, ceil(p / group), r) and (b2, ceil(q / group), r).
void quantized_into(const at::Tensor& x, const at::Tensor& U, const at::Tensor& U_scale,
                    const std::optional<at::Tensor>& S, const at::Tensor& V,
                    const at::Tensor& V_scale, int64_t bits, int64_t group, at::Tensor& y) {
  bool fits = is_output(y, x) && is_factor(U, y.size(-1)) && is_factor(V, x.size(-1)) &&
              U.size(-1) == V.size(-1) && U_scale.dim() == U.dim() && V_scale.dim() == V.dim() &&
              (bits == 8 || bits == 4) && group > 0;
  if (fits) {
    int64_t r = U_scale.size(-1);
    auto fit = [&](const at::Tensor& factor, const at::Tensor& scale) {
      return blocks_of(scale) == blocks_of(factor) &&
             scale.size(-2) == (factor.size(-2) + group - 1) / group && scale.size(-1) == r;
    };
    fits = U.size(-1) == (r * bits + 7) / 8 && fit(U, U_scale) && fit(V, V_scale);
    if (S) fits = fits && S->sizes() == at::IntArrayRef{blocks_of(U), blocks_of(V), r};
  }
  TORCH_CHECK(fits, "blastnn::quantized_into: the input and the factors do not fit together");
  at::Tensor xs = x.contiguous(), us = U.contiguous(), vs = V.contiguous(),
             ss = S ? S->contiguous() : at::Tensor();
  at::Tensor u_scale = U_scale.contiguous(), v_scale = V_scale.contiguous();
  by_type(x, [&](auto number) {
    auto a = product_of<decltype(number)>(xs, us, vs, y);
    a.b1 = blocks_of(U), a.b2 = blocks_of(V), a.r = U_scale.size(-1);
    a.S = S ? pointer<decltype(number)>(ss) : nullptr;
    bits == 8 ? run_quantized<8>(a, us, u_scale, vs, v_scale, group)
              : run_quantized<4>(a, us, u_scale, vs, v_scale, group);
  });
}

// x (..., n), U (b1, b2, p, t), V (b1, b2, q, t) into y (..., m); strided rows are Monarch's.
void blocks_into(const at::Tensor& x, const at::Tensor& U, const at::Tensor& V, bool strided,
                 at::Tensor& y) {
  bool fits = is_output(y, x) && U.dim() == 4 && V.dim() == 4 && x.size(-1) <= V.size(1) * V.size(2) &&
              y.size(-1) <= U.size(0) * U.size(2) && U.size(3) == V.size(3) &&
              U.size(0) == V.size(0) && U.size(1) == V.size(1);
  TORCH_CHECK(fits, "blastnn::blocks_into: the input and the factors do not fit together");
  at::Tensor xs = x.contiguous(), us = U.contiguous(), vs = V.contiguous();
  by_type(x, [&](auto number) {
    auto a = product_of<decltype(number)>(xs, us, vs, y);
    a.b1 = U.size(0), a.b2 = U.size(1);
    run_blocks(a, strided);
  });
}

// The same as ordinary functions.
at::Tensor output_for(const at::Tensor& x, int64_t out_features) {
  TORCH_CHECK(x.dim(), "blastnn: the input has no dimension");
  auto shape = x.sizes().vec();
  shape.back() = out_features;
  return at::empty(shape, x.options());
}

at::Tensor blast(const at::Tensor& x, const at::Tensor& U, const std::optional<at::Tensor>& S,
                 const at::Tensor& V, int64_t out_features) {
  at::Tensor y = output_for(x, out_features);
  blast_into(x, U, S, V, y);
  return y;
}

at::Tensor quantized(const at::Tensor& x, const at::Tensor& U, const at::Tensor& U_scale,
                     const std::optional<at::Tensor>& S, const at::Tensor& V,
                     const at::Tensor& V_scale, int64_t bits, int64_t group, int64_t out_features) {
  at::Tensor y = output_for(x, out_features);
  quantized_into(x, U, U_scale, S, V, V_scale, bits, group, y);
  return y;
}

at::Tensor blocks(const at::Tensor& x, const at::Tensor& U, const at::Tensor& V, bool strided,
                  int64_t out_features) {
  at::Tensor y = output_for(x, out_features);
  blocks_into(x, U, V, strided, y);
  return y;
}

}  // namespace

// `blast` gets its gradients in Python, which costs microseconds a call even where nobody wants any.
// The others have none. `_into` writes into memory that the caller has: a compiled model uses it again.
TORCH_LIBRARY(blastnn, library) {
  library.def("blast(Tensor x, Tensor U, Tensor? S, Tensor V, int out_features) -> Tensor");
  library.def("blast_forward(Tensor x, Tensor U, Tensor? S, Tensor V, int out_features) -> Tensor");
  library.def("blocks_forward(Tensor x, Tensor U, Tensor V, bool strided, int out_features) -> Tensor");
  library.def(
      "quantized_forward(Tensor x, Tensor U, Tensor U_scale, Tensor? S, Tensor V, Tensor V_scale, "
      "int bits, int group, int out_features) -> Tensor");
  library.def("blast_into(Tensor x, Tensor U, Tensor? S, Tensor V, Tensor(a!) y) -> ()");
  library.def("blocks_into(Tensor x, Tensor U, Tensor V, bool strided, Tensor(a!) y) -> ()");
  library.def(
      "quantized_into(Tensor x, Tensor U, Tensor U_scale, Tensor? S, Tensor V, Tensor V_scale, "
      "int bits, int group, Tensor(a!) y) -> ()");
  library.def("factor(Tensor gram, float[] ridge) -> (Tensor, Tensor)");
  library.def("solve_factored(Tensor lower, Tensor right) -> Tensor");
  library.def(
      "descend_couplings(Tensor own, Tensor gram, Tensor right, Tensor start, int steps) -> Tensor");
  library.def("attend_causally(Tensor q, Tensor k, Tensor v, float scale) -> Tensor");
  library.def("silu_times(Tensor(a!) gate, Tensor up) -> ()");
  library.def("weighted_grams(Tensor gram, Tensor couplings) -> Tensor");
  library.def(
      "add_weighted_grams(Tensor gram, Tensor left, Tensor right, Tensor(a!) total) -> ()");
  library.def("explained_by(Tensor own, Tensor gram, Tensor couplings) -> Tensor");
  library.def("paired_sums(Tensor products, Tensor factors) -> Tensor");
  library.def("add_coupled(Tensor products, Tensor couplings, Tensor(a!) total) -> ()");
  library.def(
      "sweep_freely(Tensor rows, Tensor U, Tensor S, Tensor V, float[] omega, float[] penalty, "
      "float ridge, int coupling_steps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, bool)");
}

TORCH_LIBRARY_IMPL(blastnn, CPU, library) {
  library.impl("blast", &blast);
  library.impl("blast_forward", &blast);
  library.impl("blocks_forward", &blocks);
  library.impl("quantized_forward", &quantized);
  library.impl("blast_into", &blast_into);
  library.impl("blocks_into", &blocks_into);
  library.impl("quantized_into", &quantized_into);
  library.impl("factor", &factor);
  library.impl("solve_factored", &solve_factored);
  library.impl("descend_couplings", &descend_couplings);
  library.impl("attend_causally", &attend_causally);
  library.impl("silu_times", &silu_times);
  library.impl("weighted_grams", &weighted_grams);
  library.impl("add_weighted_grams", &add_weighted_grams);
  library.impl("explained_by", &explained_by);
  library.impl("paired_sums", &paired_sums);
  library.impl("add_coupled", &add_coupled);
  library.impl("sweep_freely", &sweep_freely);
}
