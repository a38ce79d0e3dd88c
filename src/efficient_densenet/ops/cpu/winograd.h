// 3×3 convolutions with 16 multiplications in place of 36 for every 2×2 pixels.
//
// Winograd's minimal filtering F(2×2, 3×3) (Lavin, Gray: Fast Algorithms for Convolutional Neural Networks, 2016). For
// a 2×2 tile y of the result, the 4×4 pixels d around it and the window g,
//
//   y = Aᵀ[(G g Gᵀ) ∘ (Bᵀ d B)]A,   Bᵀ = 1  0 -1  0   G =  1   0   0   Aᵀ = 1  1  1  0
//                                        0  1  1  0       ½   ½   ½        0  1 -1 -1
//                                        0 -1  1  0       ½  -½   ½
//                                        0  1  0 -1       0   0   1
//
// and summed over channels each of the 16 positions is a matrix product over all tiles. The gradient of the prefix is the
// same with the window turned round. That of the window is the transpose: Gᵀ[Σ (A ∂y Aᵀ) ∘ (Bᵀ d B)]G. The factors ±1
// and ½ keep the error of a sum in the size of the direct one's (tests compare both with double precision).
//
// An infinite or undefined value would spread over its tile: where one turns up, PyTorch's convolution has to do it.
#pragma once

#include "units.h"

BEGIN_LEVEL

constexpr Index kPositions = 16;

// Units whose lines of tiles come to about so many tiles, or fewer where not every thread would have a unit.
inline Units winograd_units(const Grid &grid, Index tiles, int threads) {
  Index across = (grid.width + 1) / 2;
  Units units(grid, across < tiles ? tiles / across * 2 : 2);
  while (units.count < threads && units.lines > 2)
    units = Units(grid, units.lines > 4 ? (units.lines + 2) / 4 * 2 : 2);
  return units;
}
// Channels of the prefix that are transformed at a time, so that all positions stay in the cache.
inline Index channels_at_a_time(const Units &units, Index channels) {
  Index most = 3072 / units.tiles();
  most = most < kW ? kW : most > 96 ? 96 : most;
  Index blocks = (channels + most - 1) / most;
  return vectors_of((channels + blocks - 1) / blocks) * kW;
}

// Values of a scratch: position by position, tile by tile, `stride` values for each.
struct Positions {
  Index stride, distance; // from tile to tile, from position to position
  // Positions that lie a multiple of 4096 bytes apart would fight for the same lines of the cache.
  Positions(Index tiles, Index channels) : stride(vectors_of(channels) * kW), distance(tiles * stride + kW) {}
  Index size() const { return kPositions * distance; }
};

// to = Bᵀ d B for the tiles of a unit, which lies with its border in a scratch, `stride` values from pixel to pixel.
inline void transform_input(const Units &units, const Unit &unit, const float *from, Index stride, float *to,
                            Positions at) {
  Index across = units.across, line = units.wide * stride;
  for (Index y = 0; y < unit.lines; y += 2, from += 2 * line, to += across * at.stride)
    for (Index c = 0; c < stride; c += kW) {
      Vector d[4][4]; // four columns, transformed vertically
      auto column = [&](Index pixel, Vector(&to)[4]) {
        const float *p = from + pixel * stride + c;
        Vector v0 = load<kW>(p), v1 = load<kW>(p + line), v2 = load<kW>(p + 2 * line), v3 = load<kW>(p + 3 * line);
        to[0] = v0 - v2, to[1] = v1 + v2, to[2] = v2 - v1, to[3] = v1 - v3;
      };
      column(0, d[0]);
      column(1, d[1]);
      for (Index t = 0; t < across; ++t) {
        column(2 * t + 2, d[2]);
        column(2 * t + 3, d[3]);
        float *p = to + t * at.stride + c;
        UNROLL for (int i = 0; i < 4; ++i, p += 4 * at.distance) {
          store<kW>(p, d[0][i] - d[2][i]);
          store<kW>(p + at.distance, d[1][i] + d[2][i]);
          store<kW>(p + 2 * at.distance, d[2][i] - d[1][i]);
          store<kW>(p + 3 * at.distance, d[1][i] - d[3][i]);
          d[0][i] = d[2][i], d[1][i] = d[3][i];
        }
      }
    }
}

// to = A ∂y Aᵀ for the tiles of a unit; as above.
inline void transform_gradient(const Units &units, const Unit &unit, const float *from, Index stride, float *to,
                               Positions at) {
  Index across = units.across, line = units.wide * stride;
  from += line + stride; // the first pixel inside of the border
  for (Index y = 0; y < unit.lines; y += 2, from += 2 * line, to += across * at.stride)
    for (Index c = 0; c < stride; c += kW)
      for (Index t = 0; t < across; ++t) {
        Vector rows[4][2];
        UNROLL for (int j = 0; j < 2; ++j) {
          const float *q = from + (2 * t + j) * stride + c;
          Vector upper = load<kW>(q), lower = load<kW>(q + line);
          rows[0][j] = upper, rows[1][j] = upper + lower, rows[2][j] = upper - lower, rows[3][j] = -lower;
        }
        float *p = to + t * at.stride + c;
        UNROLL for (int i = 0; i < 4; ++i, p += 4 * at.distance) {
          store<kW>(p, rows[i][0]);
          store<kW>(p + at.distance, rows[i][0] + rows[i][1]);
          store<kW>(p + 2 * at.distance, rows[i][0] - rows[i][1]);
          store<kW>(p + 3 * at.distance, -rows[i][1]);
        }
      }
}

// Calls work(first pixel's row in the unit, whether there is a column to its right, whether a line below) for each tile.
template <class Work> inline void for_each_tile(const Units &units, const Unit &unit, const Work &work) {
  for (Index y = 0; y < unit.lines; y += 2)
    for (Index x = 0; x < units.width; x += 2)
      work(y * units.width + x, x + 1 < units.width, y + 1 < unit.lines);
}

// out = Aᵀ m A for the tiles of a unit; `finite` is left as it is if all of it is.
template <class E> struct OutputTransform {
  const Units &units;
  const Unit &unit;
  const float *from;
  Positions at;
  E *out; // the unit's first row
  Index ldo;
  bool &finite;
  template <int W> void run(Index c) const {
    using V = vector<float, W>;
    const float *p = from + c;
    V other{}; // zero, unless something is not finite
    for_each_tile(units, unit, [&](Index row, bool right, bool below) {
      V m[2][4];
      UNROLL for (int j = 0; j < 4; ++j) {
        V v[4];
        UNROLL for (int i = 0; i < 4; ++i) v[i] = load<W>(p + (4 * i + j) * at.distance);
        m[0][j] = v[0] + v[1] + v[2];
        m[1][j] = v[1] - v[2] - v[3];
      }
      E *to = out + row * ldo + c;
      UNROLL for (int i = 0; i < 2; ++i) {
        V left = m[i][0] + m[i][1] + m[i][2], next = m[i][1] - m[i][2] - m[i][3];
        other += (left - left) + (next - next);
        if (i && !below)
          break;
        store<W>(to + i * units.width * ldo, left);
        if (right)
          store<W>(to + (i * units.width + 1) * ldo, next);
      }
      p += at.stride;
    });
    for (int i = 0; i < W; ++i)
      if (other[i] != 0)
        finite = false;
  }
};

// G g Gᵀ of windows, a vector for each tap; store(position, values) takes them.
template <class Store> inline void transform_windows(const Vector (&g)[9], const Store &store) {
  Vector rows[4][3];
  UNROLL for (int j = 0; j < 3; ++j) {
    Vector ends = (g[j] + g[6 + j]) * 0.5f, middle = g[3 + j] * 0.5f;
    rows[0][j] = g[j], rows[1][j] = ends + middle, rows[2][j] = ends - middle, rows[3][j] = g[6 + j];
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    Vector ends = (rows[i][0] + rows[i][2]) * 0.5f, middle = rows[i][1] * 0.5f;
    store(4 * i, rows[i][0]), store(4 * i + 1, ends + middle), store(4 * i + 2, ends - middle);
    store(4 * i + 3, rows[i][2]);
  }
}

// to[k][i] = from[i][k], `depth` values of `n` rows, a vector for each k; in single precision.
template <class E> inline void transpose_rows(const E *from, Index stride, Index depth, Index n, float *to) {
  if constexpr (std::is_same<E, float>::value)
    copy_transposed(from, stride, depth, n, kW, to);
  else
    for (Index k = 0; k < depth; ++k)
      for (Index i = 0; i < n; ++i)
        to[k * kW + i] = value(from[i * stride + k]);
}

// G g Gᵀ of every window, packed as the factor of `multiply_positions`: the sum is over the channels of the prefix.
template <class E> Buffer<float> transformed(const Weight<E> &weight, int threads) {
  Index all = vectors_of(weight.out), blocks = vectors_of(weight.in);
  Buffer<float> result(kPositions * weight.in * all * kW);
  bool taps_last = weight.in_stride != 1; // the taps of a channel lie side by side, or the channels of a tap
  int chunks = chunks_for(blocks, kPositions * weight.out * weight.in, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(blocks, chunk, chunks);
    alignas(64) float taps[9 * kW * kW] = {};
    for (Index c = range.begin * kW; c < range.end * kW && c < weight.in; c += kW) {
      Index channels = weight.in - c < kW ? weight.in - c : kW;
      for (Index j = 0, vectors; j < all; j += vectors) {
        vectors = group_of(j, all);
        for (Index v = j; v < j + vectors; ++v) {
          Index n = weight.out - v * kW < kW ? weight.out - v * kW : kW;
          const E *from = weight.data + v * kW * weight.out_stride + c * weight.in_stride;
          if (taps_last)
            transpose_rows(from, weight.out_stride, 9 * channels, n, taps);
          else
            for (Index t = 0; t < 9; ++t)
              transpose_rows(from + t * weight.tap_stride, weight.out_stride, channels, n, taps + t * kW * kW);
          float *to = result.data() + (j * kPositions * weight.in + c * vectors + (v - j)) * kW;
          for (Index i = 0; i < channels; ++i, to += vectors * kW) {
            Vector g[9];
            UNROLL for (Index t = 0; t < 9; ++t) g[t] = load<kW>(taps + (taps_last ? 9 * i + t : t * kW + i) * kW);
            transform_windows(g, [&](Index position, Vector values) {
              store<kW>(to + position * weight.in * vectors * kW, values);
            });
          }
        }
      }
    }
  });
  return result;
}

// G g Gᵀ of every window turned round, (positions, out, in).
template <class E> Buffer<float> transformed_and_turned(const Weight<E> &weight, int threads) {
  Index plane = weight.out * weight.in;
  Buffer<float> result(kPositions * plane);
  int chunks = chunks_for(weight.out, kPositions * plane, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(weight.out, chunk, chunks);
    for (Index o = range.begin; o < range.end; ++o)
      for (Index c = 0; c < weight.in; c += kW) {
        Index n = weight.in - c < kW ? weight.in - c : kW;
        const E *from = weight.data + o * weight.out_stride + c * weight.in_stride;
        float values[9][kW] = {};
        for (Index i = 0; i < n; ++i)
          for (Index t = 0; t < 9; ++t)
            values[8 - t][i] = value(from[i * weight.in_stride + t * weight.tap_stride]);
        Vector g[9];
        std::memcpy(g, values, sizeof values);
        transform_windows(g, [&](Index position, Vector one) {
          std::memcpy(result.data() + position * plane + o * weight.in + c, &one, n * sizeof(float));
        });
      }
  });
  return result;
}

// The gradient Gᵀ u G of each window from the sums u, `at`, of all parts.
template <class E>
void gather_windows(const std::vector<Buffer<float>> &parts, Positions at, const Weight<E> &weight, E *grad,
                    int threads) {
  int chunks = chunks_for(weight.out, kPositions * weight.out * weight.in, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(weight.out, chunk, chunks);
    for (Index o = range.begin; o < range.end; ++o)
      for (Index c = 0; c < weight.in; c += kW) {
        Vector columns[3][4];
        for (Index j = 0; j < 4; ++j) {
          Vector u[4] = {};
          for (Index i = 0; i < 4; ++i)
            for (const auto &part : parts)
              u[i] += load<kW>(part.data() + (4 * i + j) * at.distance + o * at.stride + c);
          Vector half = (u[1] + u[2]) * 0.5f;
          columns[0][j] = u[0] + half, columns[1][j] = (u[1] - u[2]) * 0.5f, columns[2][j] = half + u[3];
        }
        E *to = grad + o * weight.out_stride + c * weight.in_stride;
        for (Index i = 0; i < 3; ++i) {
          const Vector *u = columns[i];
          Vector half = (u[1] + u[2]) * 0.5f, row[3] = {u[0] + half, (u[1] - u[2]) * 0.5f, half + u[3]};
          for (Index j = 0; j < 3; ++j)
            for (Index k = 0; k < kW && c + k < weight.in; ++k)
              set(to[(3 * i + j) * weight.tap_stride + k * weight.in_stride], row[j][k]);
        }
      }
  });
}

// One group of columns of all 16 products: to[position] (+)= from[position] · b[position], where `b` is packed for all
// `taller` rows and here are `depth` of them from row `first` on. Calls between(i, j, n) when those from i to j of n parts are done.
template <class Between>
void multiply_positions(const float *from, Positions at, Index tiles, Index first, Index depth, const float *b,
                        Index taller, int vectors, float *to, Positions to_at, bool add, const Between &between) {
  Index width = vectors * kW;
  for (Index position = 0; position < kPositions; ++position) {
    const float *here = b + (position * taller + first) * width;
    for_tiles(tiles, tile_rows(vectors), [&](Index t, int rows) {
      with_tile(rows, vectors, ProductTile<float>{from + position * at.distance + t * at.stride, at.stride, depth, here,
                                                  to + position * to_at.distance + t * to_at.stride, to_at.stride, 1, &kHere, add});
      between(position * tiles + t, position * tiles + t + rows, kPositions * tiles);
    });
  }
}

// Whether the tiles cover the image well enough to be faster.
inline bool suits_winograd(Index height, Index width) {
  return (height + 1) / 2 * ((width + 1) / 2) * 20 < height * width * 9;
}

// Of the `step` channels that are transformed next, from the `c`th on or if there are none the next unit's first, fetch
// the parts from i to j of n: lines of a unit, and one above and below them.
template <class E>
void fetch_next(const Units &units, const Unit &unit, Matrix<E> x, const Grid &grid, Index channels, Index c, Index step,
                Index i, Index j, Index n) {
  Index row = c < channels ? unit.row : unit.row + unit.rows, all = grid.rows();
  c = c < channels ? c : 0;
  Index begin = row - units.width, end = row + (units.lines + 1) * units.width;
  begin = begin < 0 ? 0 : begin, end = end > all ? all : end;
  if (begin < end)
    fetch(Matrix<E>{x.data + c, x.ld}, begin + (end - begin) * i / n, begin + (end - begin) * j / n,
          channels - c < step ? channels - c : step);
}

// Bᵀ d B of the rectified prefix, by way of a scratch for its lines.
template <class E>
void transform_prefix(const Units &units, const Unit &unit, Matrix<E> x, Index channels, const float *scale,
                      const float *shift, float *lines, float *to, Positions at) {
  Index stride = vectors_of(channels) * kW;
  with_border(units, unit, x, stride, lines, [&](Matrix<E> from, Index pixels, float *to) {
    fill_prefix(from, pixels, channels, scale, shift, stride, to);
  });
  transform_input(units, unit, lines, stride, to, at);
}

// `convolve` for a window of 3; false where a result is not finite.
template <class E>
bool winograd(Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale, const float *shift,
              Matrix<E> out, double *moments, int threads) {
  Units units = winograd_units(grid, 32, threads);
  Index step = channels_at_a_time(units, weight.in), all = vectors_of(weight.out);
  Positions at(units.tiles(), step), out_at(units.tiles(), weight.out);
  Buffer<float> b = transformed(weight, threads);
  int chunks = static_cast<int>(units.count < threads ? units.count : threads);
  std::vector<Moments<float>> parts(chunks, Moments<float>(moments ? weight.out : 0));
  std::vector<int> all_finite(chunks);
  for_chunks(chunks, [&](int chunk) {
    Buffer<float> lines(units.scratch(step)), prefix(at.size()), result(out_at.size());
    bool finite = true;
    Range range(units.count, chunk, chunks);
    for (Index i = range.begin; i < range.end && finite; ++i) {
      Unit unit(units, i);
      for (Index c = 0; c < weight.in; c += step) {
        Index depth = weight.in - c < step ? weight.in - c : step;
        transform_prefix(units, unit, Matrix<E>{x.data + c, x.ld}, depth, scale + c, shift + c, lines.data(),
                         prefix.data(), at);
        for (Index j = 0; j < all; j += group_of(j, all))
          multiply_positions(prefix.data(), at, unit.tiles(units), c, depth, b.data() + j * kW * kPositions * weight.in,
                             weight.in, group_of(j, all), result.data() + j * kW, out_at, c > 0,
                             [&](Index from, Index to, Index n) {
                               if (!j)
                                 fetch_next(units, unit, x, grid, weight.in, c + step, step, from, to, n);
                             });
      }
      Matrix<E> to = from_row(out, unit.row);
      for_channels<kW>(0, weight.out, OutputTransform<E>{units, unit, result.data(), out_at, to.data, to.ld, finite});
      if (moments)
        parts[chunk].template add<E>(to, unit.rows, weight.out, {nullptr, 0});
    }
    all_finite[chunk] = finite;
  });
  for (int finite : all_finite)
    if (!finite)
      return false;
  if (moments)
    merge_moments(parts, 0, moments);
  return true;
}

// `convolve_backward` for a window of 3, for finite gradients and weights.
template <bool kAdd, class E>
void winograd_backward(Matrix<E> grad, Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale,
                       const float *shift, const float *mean, Matrix<E> grad_x, E *grad_weight, double *sums,
                       int threads) {
  constexpr Index kGroup = 3; // vectors of results at a time, so that they stay in the cache
  // Sums for the weight are read and written once for each unit.
  Units units = winograd_units(grid, kRegisters == 32 ? 64 : 32, threads);
  Index step = channels_at_a_time(units, weight.in), all = vectors_of(weight.in), plane = weight.out * weight.in;
  Positions at(units.tiles(), step), grad_at(units.tiles(), weight.out), result_at(units.tiles(), kGroup * kW);
  Positions weight_at(weight.out, weight.in);
  Buffer<float> windows = transformed_and_turned(weight, threads);
  Buffer<float> b = packed<float>(windows.data(), kPositions, plane, weight.out, weight.in, weight.in, 1, threads,
                                       kGroup);
  int chunks = static_cast<int>(units.count < threads ? units.count : threads);
  std::vector<Sums<float>> parts(chunks, Sums<float>(weight.in));
  std::vector<Buffer<float>> weight_parts(chunks);
  for_chunks(chunks, [&](int chunk) {
    Buffer<float> lines(grad_weight ? units.scratch(step) : 0), prefix(grad_weight ? at.size() : 0);
    Buffer<float> grad_lines(units.scratch(grad_at.stride)), around(grad_at.size()), result(result_at.size());
    Buffer<float> g(units.lines * units.width * kGroup * kW);
    if (grad_weight)
      weight_parts[chunk] = zeros(weight_at.size());
    double *totals = parts[chunk].totals.data();
    Range range(units.count, chunk, chunks);
    for (Index i = range.begin; i < range.end; ++i) {
      Unit unit(units, i);
      Index tiles = unit.tiles(units);
      with_border(units, unit, grad, grad_at.stride, grad_lines.data(), [&](Matrix<E> from, Index pixels, float *to) {
        fill_copy(from, pixels, weight.out, grad_at.stride, to);
      });
      if (grad_weight) {
        transform_gradient(units, unit, grad_lines.data(), grad_at.stride, around.data(), grad_at);
        for (Index c = 0; c < weight.in; c += step) {
          Index depth = weight.in - c < step ? weight.in - c : step;
          transform_prefix(units, unit, Matrix<E>{x.data + c, x.ld}, depth, scale + c, shift + c, lines.data(),
                           prefix.data(), at);
          for (Index position = 0; position < kPositions; ++position) {
            add_outer(Lines<float>{around.data() + position * grad_at.distance, grad_at.stride, 0}, weight.out,
                      Lines<float>{prefix.data() + position * at.distance, at.stride, 0}, depth, 1, tiles,
                      weight_parts[chunk].data() + position * weight_at.distance + c, weight_at.stride);
            fetch_next(units, unit, x, grid, weight.in, c + step, step, position, position + 1, kPositions);
          }
        }
      }
      transform_input(units, unit, grad_lines.data(), grad_at.stride, around.data(), grad_at);
      for (Index j = 0; j < all; j += group_of(j, all, kGroup)) {
        int vectors = group_of(j, all, kGroup);
        Index c = j * kW, width = vectors * kW, used = weight.in - c < width ? weight.in - c : width;
        Matrix<E> x_here{x.data + unit.row * x.ld + c, x.ld}, to{grad_x.data + unit.row * grad_x.ld + c, grad_x.ld};
        multiply_positions(around.data(), grad_at, tiles, 0, weight.out, b.data() + c * kPositions * weight.out,
                           weight.out, vectors, result.data(), result_at, false, [&](Index from, Index until, Index n) {
                             fetch<true>(to, unit.rows * from / n, unit.rows * until / n, used);
                             fetch(x_here, unit.rows * from / n, unit.rows * until / n, used);
                           });
        bool finite = true; // it is, if gradients and weights are
        for_channels<kW>(0, used, OutputTransform<float>{units, unit, result.data(), result_at, g.data(), width, finite});
        accumulate_rows_of(g.data(), accumulation<kAdd>(x_here, to, width, scale + c, shift + c, mean + c), unit.rows,
                           used, totals + c, totals + weight.in + c);
      }
    }
  });
  add_up(parts, sums);
  if (grad_weight)
    gather_windows(weight_parts, weight_at, weight, grad_weight, threads);
}

END_LEVEL
