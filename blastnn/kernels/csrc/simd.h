// Vectors of W floats through the compiler's own vector types: one source for AVX2, AVX-512, NEON.
// Only the fused multiply-add is asked for by name: compilers split `a * b + c` as they see fit, in
// one place and not in another, and then equal sums would differ in their last bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int MAX_ROWS = 12;  // of a micro-kernel: 24 accumulators of 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int W = 8;
constexpr int MAX_ROWS = 6;  // 12 accumulators of 16 registers
#else
constexpr int W = 4;
constexpr int MAX_ROWS = 8;
#endif

typedef float Vec __attribute__((vector_size(4 * W)));
typedef float LooseVec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t UintVec __attribute__((vector_size(4 * W)));
typedef uint16_t LooseHalves __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * W)));
typedef int8_t LooseBytes __attribute__((vector_size(W), aligned(1), may_alias));

struct BFloat16 {
  uint16_t bits;
};

inline Vec broadcast(float value) { return value - Vec{}; }

// total += a * b, rounded once.
inline void add(Vec& total, Vec a, Vec b) {
#if defined(__AVX512F__)
  total = _mm512_fmadd_ps(a, b, total);
#elif defined(__AVX2__) && defined(__FMA__)
  total = _mm256_fmadd_ps(a, b, total);
#elif defined(__ARM_NEON)
  total = vfmaq_f32(total, a, b);
#else
  for (int lane = 0; lane < W; ++lane) total[lane] = std::fma(a[lane], b[lane], total[lane]);
#endif
}

inline void add(float& total, float a, float b) { total = std::fma(a, b, total); }

inline Vec load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }

inline Vec load(const BFloat16* from) {
  auto halves = *reinterpret_cast<const LooseHalves*>(from);
  return reinterpret_cast<Vec>(__builtin_convertvector(halves, UintVec) << 16);
}

inline void store(float* to, Vec value) { *reinterpret_cast<LooseVec*>(to) = value; }

// The first `count` of a vector, zeros behind them; no more memory is touched.
inline Vec load_some(const float* from, int count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
#else
  Vec value{};
  for (int lane = 0; lane < count; ++lane) value[lane] = from[lane];
  return value;
#endif
}

inline void store_some(float* to, Vec value, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), value);
#else
  for (int lane = 0; lane < count; ++lane) to[lane] = value[lane];
#endif
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void put(float* to, float value) { *to = value; }

// Rounded to nearest, ties to even; a NaN stays one.
inline void put(BFloat16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) {
    to->bits = uint16_t((bits >> 16) | 0x40);
  } else {
    to->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

// Rows of whole numbers of BITS bits, moved over like a pointer, in steps of columns: bytes, or
// nibbles k + 8 of which the low one comes first (a step is then an even number of columns).
template <int BITS>
struct Packed {
  const uint8_t* bytes;

  Packed operator+(long columns) const { return {bytes + columns * BITS / 8}; }
  float operator[](long column) const {
    if (BITS == 8) return int8_t(bytes[column]);
    return int(bytes[column / 2] >> column % 2 * 4 & 15) - 8;
  }
};

inline Vec load(Packed<8> from) {
#if defined(__AVX512F__)
  auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from.bytes));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
  auto bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from.bytes));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
  return __builtin_convertvector(*reinterpret_cast<const LooseBytes*>(from.bytes), Vec);
#endif
}

inline Vec load(Packed<4> from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  int word;
  std::memcpy(&word, from.bytes, 4);
  auto places = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  auto nibbles = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), places),
                                  _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(nibbles, _mm256_set1_epi32(8)));
#else
  IntVec numbers;
  for (int lane = 0; lane < W; lane += 8) {
    uint32_t word;
    std::memcpy(&word, from.bytes + lane / 2, W < 8 ? W / 2 : 4);
    for (int k = 0; k < (W < 8 ? W : 8); ++k) numbers[lane + k] = int(word >> 4 * k & 15) - 8;
  }
  return __builtin_convertvector(numbers, Vec);
#endif
}

inline const void* address(const float* from) { return from; }
inline const void* address(const BFloat16* from) { return from; }
template <int BITS>
const void* address(Packed<BITS> from) { return from.bytes; }

inline long bytes_of(const float*, long columns) { return 4 * columns; }
inline long bytes_of(const BFloat16*, long columns) { return 2 * columns; }
template <int BITS>
long bytes_of(Packed<BITS>, long columns) { return columns * BITS / 8; }

inline float sum_of(Vec lanes) {
  float total = lanes[0];
  for (int lane = 1; lane < W; ++lane) total += lanes[lane];
  return total;
}

// One exchange of a block transpose: blocks of D lanes swap between vectors D apart.
template <int D, bool FIRST, size_t... LANE>
inline Vec exchanged(Vec a, Vec b, std::index_sequence<LANE...>) {
  if constexpr (FIRST)
    return __builtin_shufflevector(a, b, (LANE & D ? W + LANE - D : LANE)...);
  else
    return __builtin_shufflevector(a, b, (LANE & D ? W + LANE : LANE + D)...);
}

// W vectors as a W x W matrix, transposed in registers.
template <int D = W / 2>
inline void transpose(Vec* rows) {
  if constexpr (D > 0) {
    constexpr std::make_index_sequence<W> lanes;
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & D)) {
        Vec a = rows[i], b = rows[i + D];
        rows[i] = exchanged<D, true>(a, b, lanes);
        rows[i + D] = exchanged<D, false>(a, b, lanes);
      }
    transpose<D / 2>(rows);
  }
}
