// Pairs of bfloat16: their product, and rows of pairs.
#pragma once

#include "elements.h"

BEGIN_LEVEL

inline Words load_elements(const pair *p) {
  Words v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vector multiply_add(pair s, Words v, Vector sum) {
#if PAIRS
  std::int32_t bits;
  std::memcpy(&bits, &s, sizeof bits);
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)v, (__m512bh)_mm512_set1_epi32(bits));
#else
  Words low = v << 16, high = v & static_cast<std::int32_t>(0xffff0000);
  return sum + value(s.first) * (Vector)low + value(s.second) * (Vector)high;
#endif
}

// Every two rows of x made one of pairs, `stride` pairs from one to the next; with kRectify relu(scale·x + shift).
template <bool kRectify> struct PairRowsBody {
  const bf16 *x;
  Index ldx, rows, stride;
  const float *scale, *shift;
  pair *out;
  template <int W> void run(Index c) const {
    using V = vector<float, W>;
    V a{}, b{};
    if constexpr (kRectify)
      a = load<W>(scale + c), b = load<W>(shift + c);
    auto row = [&](Index r) {
      V v = load<W>(x + r * ldx + c);
      if constexpr (kRectify)
        v = rectify(v * a + b);
      return v;
    };
    for (Index r = 0; r < rows; r += 2) {
      typename Vectors<float, W>::bits16 first, second;
      store<W>(reinterpret_cast<bf16 *>(&first), row(r));
      store<W>(reinterpret_cast<bf16 *>(&second), r + 1 < rows ? row(r + 1) : V{});
      using Wide = typename Vectors<float, W>::bits32;
      Wide both = __builtin_convertvector(first, Wide) | __builtin_convertvector(second, Wide) << 16;
      std::memcpy(out + r / 2 * stride + c, &both, sizeof both);
    }
  }
};
template <bool kRectify, class E, class T>
void pair_rows(Matrix<E> x, Index rows, Index channels, const float *scale, const float *shift, Index stride, T *out) {
  for_channels<kW>(0, channels, PairRowsBody<kRectify>{x.data, x.ld, rows, stride, scale, shift, out});
}

END_LEVEL
