// 3×3 convolutions with 16 multiplications in place of 36 for every 2×2 pixels: Winograd's minimal filtering.
//
// Summed over channels, each of the 16 positions of a transformed tile (`winograd_transforms.h`) is a matrix product over
// all tiles. The gradient of the prefix is the same with the window turned round. In the gradient of the window, each
// position is a sum over all tiles, and is transformed once, at the end.
//
// An infinite or undefined value would spread over its tile: where one turns up, PyTorch's convolution has to do it.
#pragma once

#include "winograd_transforms.h"

BEGIN_LEVEL

// Whether the tiles cover the image well enough to be faster.
inline bool suits_winograd(Index height, Index width) {
  return (height + 1) / 2 * ((width + 1) / 2) * 20 < height * width * 9;
}

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

// One group of columns of all 16 products: to[position] (+)= from[position] · b[position], for `depth` of the `all` rows
// for which `b` is packed, from row `first` on. Calls between(i, j, n) when those from i to j of n parts are done.
template <class Between>
void multiply_positions(const float *from, Positions at, Index tiles, Index first, Index depth, const float *b,
                        Index all, int vectors, float *to, Positions to_at, bool add, const Between &between) {
  Index width = vectors * kW;
  for (Index position = 0; position < kPositions; ++position) {
    const float *here = b + (position * all + first) * width;
    for_tiles(tiles, tile_rows(vectors), [&](Index t, int rows) {
      with_tile(rows, vectors, ProductTile<float>{from + position * at.distance + t * at.stride, at.stride, depth, here,
                                                  to + position * to_at.distance + t * to_at.stride, to_at.stride, 1, &kHere, add});
      between(position * tiles + t, position * tiles + t + rows, kPositions * tiles);
    });
  }
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
    fetch(from_channel(x, c), begin + (end - begin) * i / n, begin + (end - begin) * j / n,
          channels - c < step ? channels - c : step);
}

// `convolve` for a window of 3; false where a result is not finite.
template <class E>
bool winograd(Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale, const float *shift,
              Matrix<E> out, double *moments, int threads) {
  Units units = winograd_units(grid, 32, threads);
  Index step = channels_at_a_time(units, weight.in), all = vectors_of(weight.out);
  Positions at(units.tiles(), step), out_at(units.tiles(), weight.out);
  Buffer<float> b = transformed(weight, threads);
  int chunks = units.chunks(threads);
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
        transform_prefix(units, unit, from_channel(x, c), depth, scale + c, shift + c, lines.data(), prefix.data(),
                         at);
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
  int chunks = units.chunks(threads);
  std::vector<Sums<float>> parts(chunks, Sums<float>(weight.in));
  std::vector<Buffer<float>> weight_parts(chunks);
  for_chunks(chunks, [&](int chunk) {
    Buffer<float> lines(grad_weight ? units.scratch(step) : 0), prefix(grad_weight ? at.size() : 0);
    Buffer<float> grad_lines(units.scratch(grad_at.stride)), grad_tiles(grad_at.size()), result(result_at.size());
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
        transform_gradient(units, unit, grad_lines.data(), grad_at.stride, grad_tiles.data(), grad_at);
        for (Index c = 0; c < weight.in; c += step) {
          Index depth = weight.in - c < step ? weight.in - c : step;
          transform_prefix(units, unit, from_channel(x, c), depth, scale + c, shift + c, lines.data(), prefix.data(),
                           at);
          for (Index position = 0; position < kPositions; ++position) {
            add_outer(Lines<float>{grad_tiles.data() + position * grad_at.distance, grad_at.stride, 0}, weight.out,
                      Lines<float>{prefix.data() + position * at.distance, at.stride, 0}, depth, 1, tiles,
                      weight_parts[chunk].data() + position * weight_at.distance + c, weight_at.stride);
            fetch_next(units, unit, x, grid, weight.in, c + step, step, position, position + 1, kPositions);
          }
        }
      }
      transform_input(units, unit, grad_lines.data(), grad_at.stride, grad_tiles.data(), grad_at);
      for (Index j = 0; j < all; j += group_of(j, all, kGroup)) {
        int vectors = group_of(j, all, kGroup);
        Index c = j * kW, width = vectors * kW, used = weight.in - c < width ? weight.in - c : width;
        Matrix<E> x_here = from_channel(from_row(x, unit.row), c), to = from_channel(from_row(grad_x, unit.row), c);
        multiply_positions(grad_tiles.data(), grad_at, tiles, 0, weight.out, b.data() + c * kPositions * weight.out,
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
