// Weights in the order in which a product reads them, and how many vectors a product takes at a time.
#pragma once

#include "pairs.h"

BEGIN_LEVEL

#if TILES
// Of the eight registers of AMX, which hold 16 rows of a vector each, four are for a tile: see `amx.h`.
constexpr int kMostVectors = 2;
constexpr int tile_rows(int vectors) { return vectors == 1 ? 64 : 32; }
#else
// A tile stays in registers beside the vectors of one row of `b` and a value of `a`: its largest number of vectors in a row,
// of vectors in all, and of rows. AVX-512 multiplies by a value in memory; NEON needs a register for each value, and GCC
// loads several ahead: of 24 vectors, it moves some to memory and back at every step.
constexpr int kMostVectors = kRegisters == 32 ? 4 : 3;
constexpr int kTileVectors = kVectorBytes == 64 ? 24 : kRegisters == 32 ? 21 : 12;
constexpr int tile_rows(int vectors) { return kTileVectors / vectors < 14 ? kTileVectors / vectors : 14; }
#endif
// The most vectors of a tile with so many rows.
constexpr int tile_vectors(int rows) {
  int vectors = kMostVectors;
  while (vectors > 1 && tile_rows(vectors) < rows)
    --vectors;
  return vectors;
}

// How many rows of an operand may be read beyond those that a tile needs; nothing is made of them.
constexpr Index kRowsBehind = TILES ? 15 : 0;

// A tile of AMX adds up to 16 pairs of elements to a sum at a time: how many, so that a sum of `n` takes few and equal
// steps; and how many elements of type T a sum over so many channels or rows is then of: zeros come behind them.
inline Index step_of(Index n) { return n ? (n + (n + 15) / 16 - 1) / ((n + 15) / 16) : 1; }
template <class T> inline Index depth_of(Index scalars) {
  Index n = elements<T>(scalars), step = TILES ? step_of(n) : 1;
  return (n + step - 1) / step * step;
}

// Rows of elements, `ld` from row to row and `line` from line to line.
template <class T> struct Lines {
  const T *data;
  Index ld, line;
};

constexpr Index kHere = 0;

// Vectors in the group that begins at vector `j` of `all`: at most so many, in groups of nearly one size.
inline int group_of(Index j, Index all, Index most = kMostVectors) {
  Index left = all - j, groups = (left + most - 1) / most;
  return static_cast<int>((left + groups - 1) / groups);
}

template <class E, class S> struct CopyBody {
  const E *x;
  Index ldx, rows, ldo;
  S *out;
  template <int W> void run(Index c) const {
    for (Index r = 0; r < rows; ++r)
      store<W>(out + r * ldo + c, load<W>(x + r * ldx + c));
  }
};

// Whether the compiler knows how to exchange values of vectors.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLES 1
#else
#define SHUFFLES 0
#endif

#if SHUFFLES
template <int S, std::size_t... I> inline void exchange(Words &a, Words &b, std::index_sequence<I...>) {
  Words first = __builtin_shufflevector(a, b, (I & S ? kW + I - S : I)...);
  b = __builtin_shufflevector(a, b, (I & S ? kW + I : I + S)...);
  a = first;
}
// Transposes a square of words: squares of side S change places inside of squares twice as large.
template <int S = 1> inline __attribute__((always_inline)) void transpose(Words (&rows)[kW]) {
  UNROLL for (int i = 0; i < kW; ++i) if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_index_sequence<kW>());
  if constexpr (2 * S < kW)
    transpose<2 * S>(rows);
}
#endif

// to[k·width + i] = from[i·stride + k], elements of one word each; `width` is of whole vectors, which are written. It takes
// a few rows at a time: the processor fetches ahead for no more.
template <class T> void copy_transposed(const T *from, Index stride, Index depth, Index n, Index width, T *to) {
  static_assert(sizeof(T) == 4);
  Index whole = 0;
#if SHUFFLES
  whole = depth / kW * kW;
  for (Index i = 0; i < n; i += kW)
    for (Index k = 0; k < whole; k += kW) {
      Words rows[kW] = {};
      for (Index r = 0; r < kW && i + r < n; ++r)
        std::memcpy(&rows[r], from + (i + r) * stride + k, sizeof(Words));
      transpose(rows);
      for (Index r = 0; r < kW; ++r)
        std::memcpy(to + (k + r) * width + i, &rows[r], sizeof(Words));
    }
#endif
  for (Index k = whole; k < depth; ++k)
    for (Index i = 0; i < n; ++i)
      to[k * width + i] = from[i * stride + k];
}

// Packed for `ProductTile`: [group][place][k][vectors of the group, at most `most`], zeros beyond `n`; taken from
// data[place·place_stride + k·k_stride + i·n_stride].
template <class T, class E>
Buffer<T> packed(const E *data, Index places, Index place_stride, Index depth, Index k_stride, Index n, Index n_stride,
                 int threads, Index most = kMostVectors) {
  constexpr Index kPer = kScalars<T>, kSquare = 16;
  Index all = vectors_of(n), tall = depth_of<T>(depth);
  Buffer<T> result(places * tall * all * kW);
  int chunks = chunks_for(tall, places * depth * n, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(tall, chunk, chunks);
    auto within = [&](Index k) { return k * kPer < depth ? k * kPer : depth; };
    Index begin = within(range.begin), end = within(range.end), whole = (end - begin) / kPer;
    for (Index j = 0; j < all; j += group_of(j, all, most)) {
      Index width = group_of(j, all, most) * kW, used = n - j * kW < width ? n - j * kW : width;
      for (Index place = 0; place < places; ++place) {
        T *to = result.data() + j * kW * places * tall + (place * tall + range.begin) * width;
        const E *from = data + place * place_stride + j * kW * n_stride + begin * k_stride;
        if (used < width || end - begin < range.size() * kPer)
          std::memset(to, 0, range.size() * width * sizeof(T));
        Index k0 = 0; // up to which a fast way has gone
        if (n_stride == 1) {
          k0 = end - begin;
          if constexpr (kPer == 1)
            for_channels<kW>(0, used, CopyBody<E, T>{from, k_stride, k0, width, to});
          else
            pair_rows<false>(Matrix<const E>{from, k_stride}, k0, used, nullptr, nullptr, width, to);
        } else if constexpr (std::is_same<E, Scalar<T>>::value) {
          if (k_stride == 1 && n_stride % kPer == 0) {
            k0 = whole * kPer;
            copy_transposed(reinterpret_cast<const T *>(from), n_stride / kPer, whole, used, width, to);
          }
        }
        // In small squares, for one side or the other is far apart in memory.
        for (; k0 < end - begin; k0 += kSquare)
          for (Index i = 0; i < used; ++i)
            for (Index k = k0; k < end - begin && k < k0 + kSquare; ++k)
              assign(scalars(to)[(k / kPer * width + i) * kPer + k % kPer], from[k * k_stride + i * n_stride]);
      }
    }
  });
  return result;
}

END_LEVEL
