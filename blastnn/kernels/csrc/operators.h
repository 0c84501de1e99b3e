// What all operators that PyTorch sees need.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <omp.h>

// Multiplications for which other threads are not woken: what they save is little, and what it costs
// where they do not come at once, because the machine is busy, is a thousand times more.
constexpr long SERIAL = 1 << 17;

inline int threads_for(long multiplications) {
  return omp_in_parallel() || multiplications < SERIAL ? 1 : at::get_num_threads();
}

template <class T>
const T* pointer(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
