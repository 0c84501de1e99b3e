// What a gated MLP puts between its layers, silu(gate) * up, in one pass over both.
#pragma once

#include "exponential.h"
#include "operators.h"
#include "product.h"

// x / (1 + exp(-x)), by way of exp(-|x|), which does not overflow.
inline Vec silu_of(Vec x) {
  const Vec one = broadcast(1.0f);
  Vec e = exp_of(x < Vec{} ? x : -x);
  e = x < broadcast(-87.0f) ? Vec{} : e;  // what exp_of does not tell from that at -87
  return x * (x < Vec{} ? e : one) / (one + e);
}

// gate = silu(gate) * up, `count` numbers each.
inline void multiply_gated(float* gate, const float* up, long count) {
  long k = 0;
  for (; k + W <= count; k += W) store(gate + k, silu_of(load(gate + k)) * load(up + k));
  int rest = int(count - k);
  if (rest) store_some(gate + k, silu_of(load_some(gate + k, rest)) * load_some(up + k, rest), rest);
}

inline void silu_times(at::Tensor& gate, const at::Tensor& up) {
  bool fits = gate.sizes() == up.sizes() && gate.is_contiguous() &&
              gate.scalar_type() == at::kFloat && up.scalar_type() == at::kFloat;
  TORCH_CHECK(fits, "blastnn::silu_times: the gate and what it is multiplied with do not fit together");
  at::Tensor ups = up.contiguous();
  float* to = static_cast<float*>(gate.mutable_data_ptr());
  in_parallel(threads_for(16 * gate.numel()), [&](int thread, int threads, auto) {
    Range mine = share(gate.numel(), W, thread, threads);
    multiply_gated(to + mine.from, pointer<float>(ups) + mine.from, mine.to - mine.from);
  });
}
