// The operators that PyTorch sees.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "few_tokens.h"
#include "many_tokens.h"

namespace {

constexpr long SERIAL = 32768;  // multiplications for which waking other threads does not pay

template <class T>
void run(const Product<T>& a) {
  long work = a.tokens * a.r * (a.b1 * a.p + a.b2 * a.q);
  int threads = omp_in_parallel() || work < SERIAL ? 1 : at::get_num_threads();
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
const T* pointer(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
void start(const at::Tensor& x, const at::Tensor& U, const std::optional<at::Tensor>& S,
           const at::Tensor& V, at::Tensor& y) {
  Product<T> a{};
  a.in_features = x.size(-1), a.out_features = y.size(-1);
  a.tokens = a.out_features ? y.numel() / a.out_features : 0;
  a.b1 = U.size(0), a.p = U.size(1), a.r = U.size(2), a.b2 = V.size(0), a.q = V.size(1);
  a.x = pointer<T>(x), a.U = pointer<T>(U), a.V = pointer<T>(V);
  a.S = S ? pointer<T>(*S) : nullptr;
  a.y = static_cast<T*>(y.mutable_data_ptr());
  run(a);
}

// x (..., n), U (b1, p, r), S (b1, b2, r) or none, V (b2, q, r) -> (..., m).
at::Tensor blast(const at::Tensor& x, const at::Tensor& U, const std::optional<at::Tensor>& S,
                 const at::Tensor& V, int64_t out_features) {
  bool fits = x.dim() && U.dim() == 3 && V.dim() == 3 && x.size(-1) <= V.size(0) * V.size(1) &&
              out_features <= U.size(0) * U.size(1) && U.size(2) == V.size(2);
  if (fits && S) fits = S->sizes() == at::IntArrayRef{U.size(0), V.size(0), U.size(2)};
  TORCH_CHECK(fits, "blastnn::blast: the input and the factors do not fit together");
  auto shape = x.sizes().vec();
  shape.back() = out_features;
  at::Tensor y = at::empty(shape, x.options());
  std::optional<at::Tensor> s;
  if (S) s = S->contiguous();
  if (x.scalar_type() == at::kFloat)
    start<float>(x.contiguous(), U.contiguous(), s, V.contiguous(), y);
  else
    start<BFloat16>(x.contiguous(), U.contiguous(), s, V.contiguous(), y);
  return y;
}

}  // namespace

// Twice the same: `blast` gets its gradients in Python, which costs microseconds a call even where
// nobody wants any; `blast_inference` has none.
TORCH_LIBRARY(blastnn, library) {
  library.def("blast(Tensor x, Tensor U, Tensor? S, Tensor V, int out_features) -> Tensor");
  library.def("blast_inference(Tensor x, Tensor U, Tensor? S, Tensor V, int out_features) -> Tensor");
}

TORCH_LIBRARY_IMPL(blastnn, CPU, library) {
  library.impl("blast", &blast);
  library.impl("blast_inference", &blast);
}
