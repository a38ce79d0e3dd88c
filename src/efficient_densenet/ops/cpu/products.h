// Matrix products whose operands are made and used in the cache: what `pointwise.h`, `winograd.h` and `windowed.h` share.
// A tile of the result stays in vector registers (`registers.h`) or in those of AMX (`amx.h`).
#pragma once

#include "loops.h"
#if TILES
#include "amx.h"
#else
#include "registers.h"
#endif

BEGIN_LEVEL

// The weight (out, in, taps) of a convolution, in whatever memory format.
template <class E> struct Weight {
  const E *data;
  Index out, in, taps, out_stride, in_stride, tap_stride;
};

// Calls work(first row, rows) for tiles of at most `most` of them, of nearly one size.
template <class Work> void for_tiles(Index rows, Index most, const Work &work) {
  Index tiles = (rows + most - 1) / most;
  for (Index i = 0; i < tiles; ++i) {
    Index from = rows * i / tiles;
    work(from, static_cast<int>(rows * (i + 1) / tiles - from));
  }
}

// A tile of a product: rows from `row` on, `count` channels from `first` on; its values, `width` from row to row.
struct Tile {
  Index row;
  int rows;
  Index first, count;
  const float *values;
  Index width;
};

// A product of rows with packed weights, as in `ProductTile`, of which only a tile exists at a time.
template <class T> struct Product {
  const T *a;
  Index lda, depth;
  const T *b;
  Index columns; // channels of the result
  Index places = 1;
  const Index *offsets = &kHere;
  bool longer_runs = false; // of its sums, see `kTermsPerSum`

  // For the groups of vectors from `begin` to `end`: tiles(most, work) calls work(row, row of `a`, rows) for each of its
  // tiles of at most `most` rows, before(tile) whatever is to be fetched, and use(tile) takes the result.
  template <class Tiles, class Before, class Use>
  void run(Index begin, Index end, const Tiles &tiles, const Before &before, const Use &use) const {
    alignas(64) float values[kLargestTile];
    TileRegisters registers(depth);
    for (Index all = vectors_of(columns), j = begin; j < end; j += group_of(j, all)) {
      int vectors = group_of(j, all);
      Index first = j * kW, width = vectors * kW, count = columns - first < width ? columns - first : width;
      tiles(tile_rows(vectors), [&](Index row, Index at, int rows) {
        Tile tile{row, rows, first, count, values, width};
        before(tile);
        ProductTile<T> product{a + at * lda, lda, depth, b + first * places * depth, values, width, places, offsets};
        if constexpr (!TILES)
          if (longer_runs)
            product.terms_per_sum *= 2;
        with_tile(rows, vectors, product);
        use(tile);
      });
    }
  }
};

// `OuterTile` for all outputs and channels, in tiles of a few outputs, of nearly one size.
template <class T>
void add_outer(Lines<T> a, Index outputs, Lines<T> b, Index channels, Index lines, Index rows, float *into,
               Index stride) {
  Index tiles = (outputs + kOutputs - 1) / kOutputs, all = vectors_of(channels);
  Index most = tile_vectors((outputs + tiles - 1) / tiles);
  TileRegisters registers(rows);
  // A slice of `b` stays in the first-level cache for all outputs.
  for (Index j = 0; j < all; j += group_of(j, all, most))
    for (Index i = 0; i < tiles; ++i) {
      Index from = outputs * i / tiles, n = outputs * (i + 1) / tiles - from;
      with_tile(static_cast<int>(n), group_of(j, all, most),
                OuterTile<T>{{a.data + from * (TILES ? a.ld : 1), a.ld, a.line},
                             {b.data + j * kW, b.ld, b.line},
                             lines,
                             rows,
                             into + from * stride + j * kW,
                             stride});
    }
}

template <class E> struct GatherBody {
  const std::vector<Buffer<float>> &parts;
  Index offset;
  E *out;
  template <int W> void run(Index c) const {
    vector<float, W> sum{};
    for (const auto &part : parts)
      sum += load<W>(part.data() + offset + c);
    store<W>(out + c, sum);
  }
};

// The gradient of the weight, in its memory format, from the sums (taps, out, stride) of all parts.
template <class E>
void gather_weight(const std::vector<Buffer<float>> &parts, Index stride, const Weight<E> &weight, E *grad,
                   int threads) {
  int chunks = chunks_for(weight.out, weight.taps * weight.out * weight.in, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(weight.out, chunk, chunks);
    for (Index o = range.begin; o < range.end; ++o)
      for (Index tap = 0; tap < weight.taps; ++tap) {
        Index offset = (tap * weight.out + o) * stride;
        E *to = grad + o * weight.out_stride + tap * weight.tap_stride;
        if (weight.in_stride == 1) {
          for_channels<kW>(0, weight.in, GatherBody<E>{parts, offset, to});
          continue;
        }
        E row[kW];
        for (Index c = 0; c < weight.in; c += kW) {
          Index n = weight.in - c < kW ? weight.in - c : kW;
          for_channels<kW>(0, n, GatherBody<E>{parts, offset + c, row});
          for (Index i = 0; i < n; ++i)
            to[(c + i) * weight.in_stride] = row[i];
        }
      }
  });
}

// Fetch rows that will be needed, at once or, into the second-level cache, soon.
template <bool kAtOnce = false, class E>
inline void fetch(Matrix<E> x, Index begin, Index end, Index channels) {
  for (Index r = begin; r < end; ++r)
    for (Index c = 0; c < channels; c += 64 / sizeof(E))
      __builtin_prefetch(x.data + r * x.ld + c, 0, kAtOnce ? 3 : 2);
  __asm__ volatile(""); // or GCC takes this for a function without an effect, and leaves out the calls
}

// Of the thread that asks: sums that only this one writes then stay in its cache from call to call.
inline Buffer<float> zeros(Index n) {
  Buffer<float> buffer(n);
  std::memset(buffer.data(), 0, n * sizeof(float));
  return buffer;
}

template <class S> void zeros_behind(S *to, Index rows, Index channels, Index stride) {
  for (Index r = 0; channels < stride && r < rows; ++r)
    std::memset(to + r * stride + channels, 0, (stride - channels) * sizeof(S));
}

// relu(scale·x + shift) of some rows, `stride` elements apart, zeros behind the channels.
template <class E, class T>
void fill_prefix(Matrix<E> x, Index rows, Index channels, const float *scale, const float *shift, Index stride, T *to) {
  Index ldo = stride * kScalars<T>;
  for (Index r = 0; r < rows; r += kTile)
    for_channels<kW>(0, channels, PrologueBody<E, Scalar<T>>{x.data + r * x.ld, x.ld, rows - r < kTile ? rows - r : kTile,
                                                             ldo, scale, shift, scalars(to + r * stride)});
  zeros_behind(scalars(to), rows, channels, ldo);
}

// The same without the rectified affine map.
template <class E, class T> void fill_copy(Matrix<E> x, Index rows, Index channels, Index stride, T *to) {
  Index ldo = stride * kScalars<T>;
  for_channels<kW>(0, channels, CopyBody<E, Scalar<T>>{x.data, x.ld, rows, ldo, scalars(to)});
  zeros_behind(scalars(to), rows, channels, ldo);
}

// Pairs of rows for a sum over rows, see `pair_rows`, with zeros behind them so that they are `depth_of` these rows.
template <bool kRectify, class E, class T>
void fill_pairs(Matrix<E> x, Index rows, Index channels, const float *scale, const float *shift, Index stride, T *to) {
  pair_rows<kRectify>(x, rows, channels, scale, shift, stride, to);
  for (Index p = elements<T>(rows); p < depth_of<T>(rows); ++p)
    std::memset(to + p * stride, 0, channels * sizeof(T));
}

template <bool kAdd, class E>
AccumulateBody<E, kAdd, float> accumulation(Matrix<E> x, Matrix<E> grad_x, Index ldgrad, const float *scale,
                                            const float *shift, const float *mean) {
  return {nullptr, ldgrad, x.data, x.ld, grad_x.data, grad_x.ld, 0, scale, shift, mean, nullptr, nullptr};
}

// Lets `body` take in the rows of `g`, `body.ldgrad` apart, and adds its sums to totals in double precision.
template <bool kAdd, class E>
__attribute__((noinline)) void accumulate_rows_of(const float *g, AccumulateBody<E, kAdd, float> body, Index rows,
                                                  Index channels, double *first, double *second) {
  for (Index r = 0; r < rows; r += kRowsPerSum) {
    float sums[2][4 * kW] = {};
    AccumulateBody<E, kAdd, float> here = body;
    here.g = g + r * body.ldgrad, here.x += r * body.ldx, here.grad_x += r * body.ldg;
    here.rows = rows - r < kRowsPerSum ? rows - r : kRowsPerSum, here.first = sums[0], here.second = sums[1];
    for_channels<kW>(0, channels, here);
    for (Index c = 0; c < channels; ++c)
      first[c] += sums[0][c], second[c] += sums[1][c];
  }
}

// Stores a tile of a result.
template <class E> inline void store_tile(const Tile &tile, Matrix<E> out) {
  for_channels<kW>(0, tile.count, CopyBody<float, E>{tile.values, tile.width, tile.rows, out.ld,
                                                     out.data + tile.row * out.ld + tile.first});
}

// What a tile of a product is for in a backward pass: the gradient at the rectifier's output, which goes to that of the
// prefix and to the sums of its channels.
template <class E, bool kAdd> struct Accumulation {
  Matrix<E> x, grad_x; // the rows of the product
  const float *scale, *shift, *mean;
  double *first, *second;

  void fetch_tile(const Tile &tile) const { // it is needed when the product is there
    fetch<true>(of_tile(grad_x, tile), 0, tile.rows, tile.count);
    fetch<true>(of_tile(x, tile), 0, tile.rows, tile.count);
  }
  void add(const Tile &tile) const {
    Index c = tile.first;
    accumulate_rows_of(tile.values,
                       accumulation<kAdd>(of_tile(x, tile), of_tile(grad_x, tile), tile.width, scale + c, shift + c,
                                          mean + c),
                       tile.rows, tile.count, first + c, second + c);
  }

private:
  static Matrix<E> of_tile(Matrix<E> m, const Tile &tile) {
    return {m.data + tile.row * m.ld + tile.first, m.ld};
  }
};

template <class E> struct FiniteBody {
  const E *x;
  Index ldx, rows;
  int &good;
  template <int W> void run(Index c) const {
    vector<float, W> rest{}; // zero, unless something is not finite
    for (Index r = 0; r < rows; ++r) {
      auto v = load<W>(x + r * ldx + c);
      rest += v - v;
    }
    for (int i = 0; i < W; ++i)
      if (rest[i] != 0)
        good = 0;
  }
};

// Whether no value is infinite or undefined.
template <class E> bool is_finite(Matrix<E> x, Index rows, Index channels, int threads) {
  int chunks = chunks_for(rows, rows * channels, threads);
  std::vector<int> good(chunks, 1);
  for_chunks(chunks, [&](int chunk) {
    Range range(rows, chunk, chunks);
    FiniteBody<E> body{x.data + range.begin * x.ld, x.ld, range.size(), good[chunk]};
    for_channels<kW>(0, channels, body);
  });
  for (int one : good)
    if (!one)
      return false;
  return true;
}

END_LEVEL
