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
    using Half = typename Vectors<float, W>::bits16;
    using Wide = typename Vectors<float, W>::bits32;
    vector<float, W> a{}, b{};
    if constexpr (kRectify)
      a = load<W>(scale + c), b = load<W>(shift + c);
    auto row = [&](Index r) {
      Half v;
      if constexpr (kRectify)
        store<W>(reinterpret_cast<bf16 *>(&v), rectify(load<W>(x + r * ldx + c) * a + b));
      else
        std::memcpy(&v, x + r * ldx + c, sizeof v);
      return __builtin_convertvector(v, Wide);
    };
    for (Index r = 0; r < rows; r += 2) {
      Wide both = row(r);
      if (r + 1 < rows)
        both |= row(r + 1) << 16;
      std::memcpy(out + r / 2 * stride + c, &both, sizeof both);
    }
  }
};
template <bool kRectify, class E, class T>
void pair_rows(Matrix<E> x, Index rows, Index channels, const float *scale, const float *shift, Index stride, T *out) {
  for_channels<kW>(0, channels, PairRowsBody<kRectify>{x.data, x.ld, rows, stride, scale, shift, out});
}

// From pairs (r₀, r₁), (r₂, r₃) … the `n` + 1 pairs (0, r₀), (r₁, r₂) …, `stride` pairs from one to the next.
struct ShiftedPairsBody {
  const pair *pairs;
  Index stride, n;
  pair *out;
  template <int W> void run(Index c) const {
    using Wide = typename Vectors<float, W>::bits32;
    Wide before{}, here;
    for (Index i = 0; i <= n; ++i, before = here) {
      here = Wide{};
      if (i < n)
        std::memcpy(&here, pairs + i * stride + c, sizeof here);
      Wide both = before >> 16 | here << 16;
      std::memcpy(out + i * stride + c, &both, sizeof both);
    }
  }
};

END_LEVEL
