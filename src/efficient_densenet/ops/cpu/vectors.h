// Vectors of values, and loops over channels. Written with the vector types of GCC and Clang: no assumptions about
// rounding, and no intrinsics but those for pairs of bfloat16.
//
// All loops go row by row through a few rows at a time, and through the channels in the widest vectors that fit, then
// half as wide ones, down to single values: nothing is read or written beyond a row.
#pragma once

#include "level.h"

BEGIN_LEVEL

template <class S, int W> struct Vectors {
  typedef S type __attribute__((vector_size(W * sizeof(S))));
  typedef std::uint32_t bits32 __attribute__((vector_size(W * 4)));
  typedef std::uint16_t bits16 __attribute__((vector_size(W * 2)));
};
template <class S, int W> using vector = typename Vectors<S, W>::type;

template <int W> inline vector<float, W> load(const float *p) {
  vector<float, W> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <int W> inline vector<double, W> load(const double *p) {
  vector<double, W> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <int W> inline vector<float, W> load(const bf16 *p) {
  typename Vectors<float, W>::bits16 half;
  std::memcpy(&half, p, sizeof half);
  typename Vectors<float, W>::bits32 bits = __builtin_convertvector(half, typename Vectors<float, W>::bits32) << 16;
  vector<float, W> v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

template <int W> inline void store(float *p, vector<float, W> v) { std::memcpy(p, &v, sizeof v); }
template <int W> inline void store(double *p, vector<double, W> v) { std::memcpy(p, &v, sizeof v); }
template <int W> inline void store(bf16 *p, vector<float, W> v) { // to the nearest, ties to even
#if PAIRS
  if constexpr (W == 16) {
    auto half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &half, sizeof half);
    return;
  }
#endif
  typename Vectors<float, W>::bits32 bits;
  std::memcpy(&bits, &v, sizeof v);
  typename Vectors<float, W>::bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  typename Vectors<float, W>::bits32 is_nan = (typename Vectors<float, W>::bits32)(v != v);
  rounded = (rounded & ~is_nan) | (is_nan & 0x7fc0);
  auto half = __builtin_convertvector(rounded, typename Vectors<float, W>::bits16);
  std::memcpy(p, &half, sizeof half);
}

// Zero where a value is at most zero; NaN stays NaN, as in PyTorch.
template <class V> inline V rectify(V v) { return v <= 0 ? V{} : v; }
template <class V> inline V where_positive(V v, V g) { return v <= 0 ? V{} : g; }

template <class E> constexpr int widest() { return kVectorBytes / sizeof(Compute<E>); }

// body.run<W>(c) for groups of W channels that together are all of them.
template <int W, class Body> inline void for_channels(Index c, Index channels, const Body &body) {
  for (; c + W <= channels; c += W)
    body.template run<W>(c);
  if constexpr (W > 1)
    if (c < channels)
      for_channels<W / 2>(c, channels, body);
}

// Sums of each channel: added up in the type of computation for a while, then in double precision.
template <class S> struct Sums {
  Index channels;
  std::vector<S> parts;
  std::vector<double> totals;
  Index rows = 0; // that are in the parts
  explicit Sums(Index channels) : channels(channels), parts(2 * channels), totals(2 * channels) {}
  S *first() { return parts.data(); }
  S *second() { return parts.data() + channels; }
  void flush() {
    for (Index i = 0; i < 2 * channels; ++i) {
      totals[i] += parts[i];
      parts[i] = 0;
    }
    rows = 0;
  }
  // So many rows were added to the parts.
  void added(Index n) {
    if ((rows += n) >= kRowsPerSum)
      flush();
  }
};

// Adds the sums of all chunks to `into`, in the order of the chunks.
template <class S> void add_up(const std::vector<Sums<S>> &parts, double *into) {
  for (const Sums<S> &part : parts)
    for (std::size_t i = 0; i < part.totals.size(); ++i)
      into[i] += part.totals[i];
}

END_LEVEL
