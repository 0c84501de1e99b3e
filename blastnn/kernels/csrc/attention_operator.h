// The operator of attention.h that PyTorch sees.
#pragma once

#include "attention.h"
#include "operators.h"

// Causal attention of prompts: q (B, H, T, D) over the first T of k and v (B, H_kv, L, D), whose heads
// serve H / H_kv of q's each, to (B, T, H, D).
inline at::Tensor attend_causally(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           double scale) {
  bool fits = q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && k.size(0) == q.size(0) &&
              k.size(2) >= q.size(2) && k.size(3) == q.size(3) && k.size(1) > 0 &&
              q.size(1) % k.size(1) == 0;
  for (const at::Tensor& tensor : {q, k, v}) fits = fits && tensor.scalar_type() == at::kFloat;
  TORCH_CHECK(fits, "blastnn::attend_causally: queries, keys and values do not fit together");
  auto heads = [](const at::Tensor& tensor) {
    return Heads{pointer<float>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  };
  auto plain = [](const at::Tensor& tensor) {
    return tensor.stride(3) == 1 ? tensor : tensor.contiguous();
  };
  at::Tensor qs = plain(q), ks = plain(k), vs = plain(v);
  int64_t batch = q.size(0), count = q.size(1), tokens = q.size(2), width = q.size(3);
  at::Tensor y = at::empty({batch, tokens, count, width}, q.options());
  if (!y.numel()) return y;
  Attention attention{batch, count, k.size(1), tokens, width, float(scale), heads(qs),
                      heads(ks), heads(vs), static_cast<float*>(y.mutable_data_ptr())};
  attend_all(attention, threads_for(batch * count * tokens * tokens * width));
  return y;
}
