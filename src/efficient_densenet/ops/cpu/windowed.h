// 3×3 convolutions in bfloat16 pairs. With two products at a time they need as many
// instructions as `winograd.h` does in single precision, and no transforms.
#pragma once

#include "units.h"

BEGIN_LEVEL

// Lines of a unit whose scratch, `stride` elements a pixel, takes about so many bytes.
inline Index lines_within(Index bytes, const Grid &grid, Index stride) {
  return bytes / 4 / stride / (grid.width + 3) - 2;
}

// How far the pixel under each tap of the window lies from the one under its centre.
struct Taps {
  Index offsets[9];
  Taps(const Units &units, Index stride) {
    for (Index tap = 0; tap < 9; ++tap)
      offsets[tap] = ((tap / 3 - 1) * units.wide + tap % 3 - 1) * stride;
  }
};

// The tiles of each line of a unit, for `Product`: rows of the unit, and their pixels in the scratch.
inline auto tiles_of(const Units &units, const Unit &unit) {
  return [&units, &unit](Index most, const auto &work) {
    for (Index y = 0; y < unit.lines; ++y)
      for_tiles(units.width, most, [&](Index from, int n) {
        work(y * units.width + from, (y + 1) * units.wide + from + 1, n);
      });
  };
}

#if !TILES
// A unit of the rectified prefix with its border, transposed: for each pair of channels all pixels, `ld` apart.
struct TransposedPrefix {
  Index stride, ld; // pairs from pixel to pixel before it is transposed, from pair to pair afterwards
  Buffer<pair> line, values;
  TransposedPrefix(const Units &units, Index channels)
      : stride(whole_vectors(elements<pair>(channels))), ld((vectors_of(units.scratch(1) + kW) | 1) * kW),
        line(units.width * stride), values(stride * ld) {
    std::memset(values.data(), 0, stride * ld * sizeof(pair));
  }
  void fill(const Units &units, const Unit &unit, Matrix<bf16> x, Index channels, const float *scale, const float *shift) {
    pair *first = values.data() + 1; // behind the border's pixel
    for_lines(
        units, unit,
        [&](Index y, Index row) {
          fill_prefix(from_row(x, row), units.width, channels, scale, shift, stride, line.data());
          // Zeros behind the line's pixels go to the border, and to pixels that the next line fills.
          copy_transposed(line.data(), stride, stride, units.width, ld, first + y * units.wide);
        },
        [&](Index y) {
          for (Index k = 0; k < stride; ++k)
            std::memset(first + k * ld + y * units.wide, 0, units.width * sizeof(pair));
        });
  }
};

// `windowed` for outputs that leave a part of a vector empty, or only just fill it: vectors are of pixels here. A run of a
// sum is a line of the window: rounding to bfloat16 is far coarser than what shorter runs would save.
inline void windowed_over_pixels(Matrix<bf16> x, const Grid &grid, const Weight<bf16> &weight, const float *scale,
                                 const float *shift, Matrix<bf16> out, double *moments, int threads) {
  Index depth = depth_of<pair>(weight.in);
  Units units(grid, lines_within(128 << 10, grid, whole_vectors(depth)));
  Buffer<pair> b = packed<pair>(weight.data, 9, weight.tap_stride, weight.in, weight.in_stride, weight.out,
                                weight.out_stride, threads);
  Index all = units.lines * units.wide, ld = whole_vectors(all) + kW;
  int chunks = units.chunks(threads);
  std::vector<Moments<float>> parts(chunks, Moments<float>(moments ? weight.out : 0));
  for_chunks(chunks, [&](int chunk) {
    TransposedPrefix prefix(units, weight.in);
    Buffer<float> sums(weight.out * ld), values(whole_vectors(units.width) * kW);
    Range range(units.count, chunk, chunks);
    for (Index i = range.begin; i < range.end; ++i) {
      Unit unit(units, i);
      Matrix<bf16> to = from_row(out, unit.row);
      prefix.fill(units, unit, x, weight.in, scale, shift);
      std::memset(sums.data(), 0, weight.out * ld * sizeof(float));
      for (Index y = 0; y < 3; ++y) { // lines of the window, whose taps lie side by side
        fetch_unit(units, unit, x, grid, weight.in, unit.rows * y / 3, unit.rows * (y + 1) / 3);
        add_outer(Lines<pair>{b.data() + 3 * y * depth * kW, kW, depth * kW}, weight.out,
                  Lines<pair>{prefix.values.data() + y * units.wide, prefix.ld, 1}, unit.lines * units.wide, 3, depth,
                  sums.data(), ld);
      }
      for (Index y = 0; y < unit.lines; ++y) {
        copy_transposed(sums.data() + y * units.wide, ld, whole_vectors(units.width), weight.out, kW, values.data());
        store_tile({y * units.width, static_cast<int>(units.width), 0, weight.out, values.data(), kW}, to);
      }
      if (moments)
        parts[chunk].add<bf16>(to, unit.rows, weight.out, {nullptr, 0});
    }
  });
  if (moments)
    merge_moments(parts, 0, moments);
}
#endif

// `convolve` for a window of 3.
inline void windowed(Matrix<bf16> x, const Grid &grid, const Weight<bf16> &weight, const float *scale,
                     const float *shift, Matrix<bf16> out, double *moments, int threads) {
#if !TILES
  if (weight.out <= kW)
    return windowed_over_pixels(x, grid, weight, scale, shift, out, moments, threads);
#endif
  Index depth = depth_of<pair>(weight.in);
  Units units(grid, lines_within(192 << 10, grid, depth));
  Taps taps(units, depth);
  Buffer<pair> b = packed<pair>(weight.data, 9, weight.tap_stride, weight.in, weight.in_stride, weight.out,
                                weight.out_stride, threads);
  int chunks = units.chunks(threads);
  std::vector<Moments<float>> parts(chunks, Moments<float>(moments ? weight.out : 0));
  for_chunks(chunks, [&](int chunk) {
    Buffer<pair> prefix(units.scratch(depth) + kRowsBehind * depth);
    Range range(units.count, chunk, chunks);
    for (Index i = range.begin; i < range.end; ++i) {
      Unit unit(units, i);
      Matrix<bf16> to = from_row(out, unit.row);
      with_border(units, unit, x, depth, prefix.data(), [&](Matrix<bf16> from, Index pixels, pair *line) {
        fill_prefix(from, pixels, weight.in, scale, shift, depth, line);
      });
      Product<pair>{prefix.data(), depth, depth, b.data(), weight.out, 9, taps.offsets}.run(
          0, vectors_of(weight.out), tiles_of(units, unit),
          [&](const Tile &tile) {
            if (!tile.first)
              fetch_unit(units, unit, x, grid, weight.in, tile.row, tile.row + tile.rows);
          },
          [&](const Tile &tile) { store_tile(tile, to); });
      if (moments)
        parts[chunk].add<bf16>(to, unit.rows, weight.out, {nullptr, 0});
    }
  });
  if (moments)
    merge_moments(parts, 0, moments);
}

// The scratch of the weight's gradient for a unit: pairs of neighbours in a line, which begin at even pixels, and for taps
// in the middle of the window at odd ones. For tiles of AMX, which add many pairs at a time, all lines are one sum: the
// gradient of the border's pixels is zero, and what lies there, or behind the last line, is finite.
struct PixelPairs {
  Index ld, line, across; // pairs from pixel pair to pixel pair, from line to line; and of a line of the gradient
  Buffer<pair> grad, transposed, even, odd;
  PixelPairs(const Units &units, Index outputs, Index channels)
      : ld(vectors_of(channels) * kW), line((units.across + 1) * ld), across(units.across + TILES),
        grad((units.lines * across + kRowsBehind) * outputs),
        transposed(TILES ? (outputs + kRowsBehind) * whole_vectors(units.lines * across + kRowsBehind) : 0), even(size(units)),
        odd(size(units)) {
    if (TILES)
      for (Buffer<pair> *prefix : {&even, &odd})
        std::memset(prefix->data(), 0, size(units) * sizeof(pair));
  }

  // From the gradient of the output of all images, and from their prefix, which is rectified.
  void fill(const Units &units, const Unit &unit, Matrix<bf16> all_grad, Index outputs, Matrix<bf16> x, Index channels,
            const float *scale, const float *shift) {
    for (Index y = 0; y < unit.lines; ++y)
      pair_rows<false>(from_row(all_grad, unit.row + y * units.width), units.width, outputs, nullptr, nullptr, outputs,
                       grad.data() + y * across * outputs);
    if (TILES)
      transpose_gradient(units, unit, outputs);
    for_lines(
        units, unit,
        [&](Index y, Index row) { // the border is one pixel wide: the first of the image stands at an odd one
          pair *to = odd.data() + y * line;
          pair_rows<true>(from_row(x, row), units.width, channels, scale, shift, ld, to);
          for_channels<kW>(0, channels, ShiftedPairsBody{to, ld, units.across, even.data() + y * line});
        },
        [&](Index y) {
          for (Buffer<pair> *prefix : {&even, &odd})
            std::memset(prefix->data() + y * line, 0, line * sizeof(pair));
        });
  }

  // into (taps, outputs, ld) += the gradient of the weight.
  void add(const Units &units, const Unit &unit, Index outputs, Index channels, float *into) const {
    Index pairs = depth(unit), lines = TILES ? 1 : unit.lines;
    Lines<pair> left{grad.data(), outputs, across * outputs};
    if (TILES)
      left = {transposed.data(), whole_vectors(pairs), 0};
    for (Index tap = 0; tap < 9; ++tap) {
      const pair *from = (tap % 3 == 1 ? odd : even).data() + tap / 3 * line + (tap % 3 == 2 ? ld : 0);
      add_outer(left, outputs, Lines<pair>{from, ld, line}, channels, lines, TILES ? pairs : units.across,
                into + tap * outputs * ld, ld);
    }
  }

private:
  Index size(const Units &units) const { return (units.lines + 2) * line + (TILES ? kRowsBehind + 1 : 0) * ld; }
  // Pairs of all lines of a unit, as many as a sum of them is of.
  Index depth(const Unit &unit) const { return depth_of<pair>(2 * unit.lines * across); }

  void transpose_gradient(const Units &units, const Unit &unit, Index outputs) {
    Index pairs = depth(unit);
    auto clear = [&](Index begin, Index end) {
      std::memset(grad.data() + begin * outputs, 0, (end - begin) * outputs * sizeof(pair));
    };
    for (Index y = 0; y < unit.lines; ++y)
      clear(y * across + units.across, (y + 1) * across);
    clear(unit.lines * across, pairs);
    copy_transposed(grad.data(), outputs, outputs, pairs, whole_vectors(pairs), transposed.data());
  }
};

// `convolve_backward` for a window of 3.
template <bool kAdd>
void windowed_backward(Matrix<bf16> grad, Matrix<bf16> x, const Grid &grid, const Weight<bf16> &weight,
                       const float *scale, const float *shift, const float *mean, Matrix<bf16> grad_x,
                       bf16 *grad_weight, double *sums, int threads) {
  Index depth = depth_of<pair>(weight.out), all = vectors_of(weight.in);
  Units units(grid, lines_within(192 << 10, grid, elements<pair>(weight.in)));
  Taps taps(units, depth);
  Buffer<pair> b = packed<pair>(weight.data + 8 * weight.tap_stride, 9, -weight.tap_stride, weight.out,
                                     weight.out_stride, weight.in, weight.in_stride, threads); // rotated by 180°
  int chunks = units.chunks(threads);
  std::vector<Sums<float>> parts(chunks, Sums<float>(weight.in));
  Index ld = all * kW;
  std::vector<Buffer<float>> weight_parts(chunks);
  for_chunks(chunks, [&](int chunk) {
    Buffer<pair> around(units.scratch(depth) + kRowsBehind * depth);
    PixelPairs pairs(units, grad_weight ? weight.out : 0, grad_weight ? weight.in : 0);
    if (grad_weight)
      weight_parts[chunk] = zeros(9 * weight.out * ld);
    double *totals = parts[chunk].totals.data();
    Range range(units.count, chunk, chunks);
    for (Index i = range.begin; i < range.end; ++i) {
      Unit unit(units, i);
      Accumulation<bf16, kAdd> accumulation{from_row(x, unit.row), from_row(grad_x, unit.row), scale, shift, mean,
                                            totals, totals + weight.in};
      with_border(units, unit, grad, depth, around.data(), [&](Matrix<bf16> from, Index pixels, pair *line) {
        fill_copy(from, pixels, weight.out, depth, line);
      });
      if (grad_weight) {
        pairs.fill(units, unit, grad, weight.out, x, weight.in, scale, shift);
        pairs.add(units, unit, weight.out, weight.in, weight_parts[chunk].data());
      }
      Product<pair>{around.data(), depth, depth, b.data(), weight.in, 9, taps.offsets}.run(
          0, all, tiles_of(units, unit),
          [&](const Tile &tile) {
            if (!tile.first)
              fetch_unit(units, unit, x, grid, weight.in, tile.row, tile.row + tile.rows);
            accumulation.fetch_tile(tile);
          },
          [&](const Tile &tile) { accumulation.add(tile); });
    }
  });
  add_up(parts, sums);
  if (grad_weight)
    gather_weight(weight_parts, ld, weight, grad_weight, threads);
}

END_LEVEL
