// Tiles of a product in vector registers: a few rows times a few vectors.
#pragma once

#include "pack.h"

BEGIN_LEVEL

// The most outputs of a tile of `OuterTile`.
constexpr Index kOutputs = tile_rows(3);
constexpr Index kLargestTile = kTileVectors * kW; // values

// Vector registers are always there.
struct TileRegisters {
  explicit TileRegisters(Index) {}
};

// acc[r][j] += Σ_k a[r·lda + k] · b[k][j]: rows of `a` against a packed block of NV vectors.
template <int MR, int NV, class T>
inline __attribute__((always_inline)) void add_rows(const T *a, Index lda, const T *b, Index n, Vector (&acc)[MR][NV]) {
  for (Index k = 0; k < n; ++k) {
    decltype(load_elements(b)) v[NV];
    UNROLL for (int j = 0; j < NV; ++j) v[j] = load_elements(b + (k * NV + j) * kW);
    UNROLL for (int r = 0; r < MR; ++r) {
      T s = a[r * lda + k];
      UNROLL for (int j = 0; j < NV; ++j) acc[r][j] = multiply_add(s, v[j], acc[r][j]);
    }
  }
}

// acc[r][j] += Σ_p a[p·lda + r] · b[p·ldb + j]: columns of `a` against columns of `b`.
template <int MR, int NV, class T>
inline __attribute__((always_inline)) void add_columns(const T *a, Index lda, const T *b, Index ldb, Index n,
                                                       Vector (&acc)[MR][NV]) {
  for (Index p = 0; p < n; ++p) {
    decltype(load_elements(b)) v[NV];
    UNROLL for (int j = 0; j < NV; ++j) v[j] = load_elements(b + p * ldb + j * kW);
    UNROLL for (int r = 0; r < MR; ++r) {
      T s = a[p * lda + r];
      UNROLL for (int j = 0; j < NV; ++j) acc[r][j] = multiply_add(s, v[j], acc[r][j]);
    }
  }
}

// body.run<MR, NV>() for sizes known at run time.
template <int MR, int NV, class Body> inline void with_rows(int rows, const Body &body) {
  if (rows == MR)
    body.template run<MR, NV>();
  else if constexpr (MR > 1)
    with_rows<MR - 1, NV>(rows, body);
}

template <int NV = kMostVectors, class Body> inline void with_tile(int rows, int vectors, const Body &body) {
  if (vectors == NV)
    with_rows<tile_rows(NV), NV>(rows, body);
  else if constexpr (NV > 1)
    with_tile<NV - 1>(rows, vectors, body);
}

// Terms of a sum that are added up one by one, a run, before their sum goes to the sum of all terms: in single precision,
// this takes away two thirds of the rounding error of a sum of 256 terms. Where no batch statistics enlarge that error,
// runs may be twice as long.
constexpr Index kTermsPerSum = 32;

// out (+)= Σ over places of a[place] · b[place] for a tile: `a` has rows `lda` elements apart, and each place's begin at
// an offset; `b` is packed for its vectors.
template <class T> struct ProductTile {
  const T *a;
  Index lda, depth;
  const T *b;
  float *out;
  Index ldo;
  Index places = 1;
  const Index *offsets = &kHere;
  bool add = false;
  Index terms_per_sum = kTermsPerSum;
  template <int MR, int NV> __attribute__((noinline)) void run() const {
    Vector acc[MR][NV] = {};
    bool more = add;
    Index terms = 0;
    for (Index place = 0; place < places; ++place)
      for (Index k = 0, n; k < depth; k += n) {
        n = depth - k < terms_per_sum ? depth - k : terms_per_sum;
        if (terms + n > terms_per_sum) {
          add_to_out<MR, NV>(acc, more);
          UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int j = 0; j < NV; ++j) acc[r][j] = Vector{};
          more = true, terms = 0;
        }
        add_rows<MR, NV>(a + offsets[place] + k, lda, b + (place * depth + k) * NV * kW, n, acc);
        terms += n;
      }
    add_to_out<MR, NV>(acc, more);
  }
  template <int MR, int NV>
  inline __attribute__((always_inline)) void add_to_out(const Vector (&acc)[MR][NV], bool more) const {
    UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int j = 0; j < NV; ++j) {
      float *to = out + r * ldo + j * kW;
      store<kW>(to, more ? load<kW>(to) + acc[r][j] : acc[r][j]);
    }
  }
};

// into (outputs, stride) += Σ over the rows of all lines of a ⊗ b, for some of the outputs and of the channels.
template <class T> struct OuterTile {
  Lines<T> a, b;
  Index lines, rows;
  float *into;
  Index stride;
  template <int MR, int NV> __attribute__((noinline)) void run() const {
    Vector acc[MR][NV] = {};
    for (Index y = 0; y < lines; ++y)
      add_columns<MR, NV>(a.data + y * a.line, a.ld, b.data + y * b.line, b.ld, rows, acc);
    UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int j = 0; j < NV; ++j) {
      float *to = into + r * stride + j * kW;
      store<kW>(to, load<kW>(to) + acc[r][j]);
    }
  }
};

END_LEVEL
