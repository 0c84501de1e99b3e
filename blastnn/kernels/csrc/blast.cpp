// The operators that PyTorch sees.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "block_low_rank.h"

namespace {

constexpr long SERIAL = 65536;  // multiplications for which waking other threads does not pay

int threads_for(long multiplications) {
  return omp_in_parallel() || multiplications < SERIAL ? 1 : at::get_num_threads();
}

template <class T>
void run(const Product<T>& a) {
  int threads = threads_for(a.tokens * a.r * (a.b1 * a.p + a.b2 * a.q));
  switch (a.tokens) {
    case 0: return;
    case 1: return few_tokens<1>(a, threads);
    case 2: return few_tokens<2>(a, threads);
    case 3: return few_tokens<3>(a, threads);
    case 4: return few_tokens<4>(a, threads);
    default: return many_tokens(a, threads);
  }
}

template <class T>
void run_blocks(const Product<T>& a, bool strided) {
  int threads = threads_for(a.tokens * a.r * a.b1 * a.b2 * (a.p + a.q));
  switch (a.tokens) {
    case 0: return;
    case 1: return few_tokens_of_blocks<1>(a, strided, threads);
    case 2: return few_tokens_of_blocks<2>(a, strided, threads);
    case 3: return few_tokens_of_blocks<3>(a, strided, threads);
    case 4: return few_tokens_of_blocks<4>(a, strided, threads);
    default: return many_tokens_of_blocks(a, strided, threads);
  }
}

template <class T>
const T* pointer(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// A product without its sizes of blocks: what both operators have in common.
template <class T>
Product<T> product_of(const at::Tensor& x, const at::Tensor& U, const at::Tensor& V, at::Tensor& y) {
  Product<T> a{};
  a.in_features = x.size(-1), a.out_features = y.size(-1);
  a.tokens = a.out_features ? y.numel() / a.out_features : 0;
  a.p = U.size(-2), a.q = V.size(-2), a.r = U.size(-1);
  a.x = pointer<T>(x), a.U = pointer<T>(U), a.V = pointer<T>(V);
  a.y = static_cast<T*>(y.mutable_data_ptr());
  return a;
}

at::Tensor output(const at::Tensor& x, int64_t out_features) {
  auto shape = x.sizes().vec();
  shape.back() = out_features;
  return at::empty(shape, x.options());
}

// run(T) for the type that the numbers have.
template <class Run>
void by_type(const at::Tensor& x, const Run& run) {
  x.scalar_type() == at::kFloat ? run(float{}) : run(BFloat16{});
}

// x (..., n), U (b1, p, r), S (b1, b2, r) or none, V (b2, q, r) -> (..., m).
at::Tensor blast(const at::Tensor& x, const at::Tensor& U, const std::optional<at::Tensor>& S,
                 const at::Tensor& V, int64_t out_features) {
  bool fits = x.dim() && U.dim() == 3 && V.dim() == 3 && x.size(-1) <= V.size(0) * V.size(1) &&
              out_features <= U.size(0) * U.size(1) && U.size(2) == V.size(2);
  if (fits && S) fits = S->sizes() == at::IntArrayRef{U.size(0), V.size(0), U.size(2)};
  TORCH_CHECK(fits, "blastnn::blast: the input and the factors do not fit together");
  at::Tensor y = output(x, out_features), xs = x.contiguous(), us = U.contiguous(),
             vs = V.contiguous(), ss = S ? S->contiguous() : at::Tensor();
  by_type(x, [&](auto number) {
    auto a = product_of<decltype(number)>(xs, us, vs, y);
    a.b1 = U.size(0), a.b2 = V.size(0);
    a.S = S ? pointer<decltype(number)>(ss) : nullptr;
    run(a);
  });
  return y;
}

// x (..., n), U (b1, b2, p, t), V (b1, b2, q, t) -> (..., m); strided rows are Monarch's.
at::Tensor blocks(const at::Tensor& x, const at::Tensor& U, const at::Tensor& V,
                  int64_t out_features, bool strided) {
  bool fits = x.dim() && U.dim() == 4 && V.dim() == 4 && x.size(-1) <= V.size(1) * V.size(2) &&
              out_features <= U.size(0) * U.size(2) && U.size(3) == V.size(3) &&
              U.size(0) == V.size(0) && U.size(1) == V.size(1);
  TORCH_CHECK(fits, "blastnn::blocks: the input and the factors do not fit together");
  at::Tensor y = output(x, out_features), xs = x.contiguous(), us = U.contiguous(),
             vs = V.contiguous();
  by_type(x, [&](auto number) {
    auto a = product_of<decltype(number)>(xs, us, vs, y);
    a.b1 = U.size(0), a.b2 = U.size(1);
    run_blocks(a, strided);
  });
  return y;
}

}  // namespace

// Twice the same: `blast` gets its gradients in Python, which costs microseconds a call even where
// nobody wants any; `blast_inference` has none. Nor has `blocks_inference`: trained blocks take the
// plain product.
TORCH_LIBRARY(blastnn, library) {
  library.def("blast(Tensor x, Tensor U, Tensor? S, Tensor V, int out_features) -> Tensor");
  library.def("blocks_inference(Tensor x, Tensor U, Tensor V, int out_features, bool strided) -> Tensor");
  library.def("blast_inference(Tensor x, Tensor U, Tensor? S, Tensor V, int out_features) -> Tensor");
}

TORCH_LIBRARY_IMPL(blastnn, CPU, library) {
  library.impl("blast", &blast);
  library.impl("blast_inference", &blast);
  library.impl("blocks_inference", &blocks);
}
