// 1×1 convolutions: a few rows of the whole matrix at a time, whose rectified prefix is made
// in a scratch of the thread and consumed from there.
#pragma once

#include "products.h"

BEGIN_LEVEL

constexpr Index kBlock = 12; // vectors of a block of channels in the backward pass

// Rows that are worked on at a time, so that a scratch of so many elements a row stays in the cache beside the weights, and
// every thread gets as many of these steps.
struct Steps {
  Index rows, count;
  Steps(Index all, Index row, int threads) {
    constexpr Index kScratch = 192 << 10; // bytes
    constexpr Index kRows = TILES ? 32 : 24; // whole tiles
    Index most = kScratch / 4 / row / kRows * kRows;
    most = most < kRows ? kRows : most > 240 ? 240 / kRows * kRows : most;
    count = (all + most - 1) / most;
    if (all >= kRows * threads)
      count = (count + threads - 1) / threads * threads;
    rows = (all + count - 1) / count;
    count = (all + rows - 1) / rows;
  }
};

// The tiles of these rows, for `Product`.
inline auto tiles_of(Index rows) {
  return [rows](Index most, const auto &work) {
    for_tiles(rows, most, [&](Index row, int n) { work(row, row, n); });
  };
}

// `convolve` for a window of 1, with operands of type T.
template <class T, class E>
void pointwise(Matrix<E> x, Index rows, const Weight<E> &weight, const float *scale, const float *shift, Matrix<E> out,
               double *moments, int threads, bool evaluates) {
  Index depth = depth_of<T>(weight.in), stride = vectors_of(depth) * kW;
  Steps steps(rows, depth, threads);
  Index step = steps.rows, count = steps.count;
  Buffer<T> b = packed<T>(weight.data, 1, 0, weight.in, weight.in_stride, weight.out, weight.out_stride, threads);
  int chunks = chunks_of(count, threads);
  std::vector<Moments<float>> parts(chunks, Moments<float>(moments ? weight.out : 0));
  for_chunks(chunks, [&](int chunk) {
    Buffer<T> prefix((step + kRowsBehind) * stride);
    Range range(count, chunk, chunks);
    for (Index first = range.begin * step; first < range.end * step; first += step) {
      Index here = rows - first < step ? rows - first : step;
      Matrix<E> to = from_row(out, first);
      fill_prefix(from_row(x, first), here, weight.in, scale, shift, stride, prefix.data());
      Product<T> product{prefix.data(), stride, depth, b.data(), weight.out};
      product.longer_runs = evaluates;
      product.run(
          0, vectors_of(weight.out), tiles_of(here),
          [&](const Tile &tile) { // what the next rows read and write
            Index next = first + step + tile.row, end = next + tile.rows < rows ? next + tile.rows : rows;
            if (!tile.first)
              fetch(x, next, end, weight.in), fetch<true>(out, next, end, weight.out);
          },
          [&](const Tile &tile) { store_tile(tile, to); });
      if (moments)
        parts[chunk].template add<E>(to, here, weight.out, {nullptr, 0});
    }
  });
  if (moments)
    merge_moments(parts, 0, moments);
}

// `convolve_backward` for a window of 1, with operands of type T.
template <class T, bool kAdd, class E>
void pointwise_backward(Matrix<E> grad, const Flow<E> &flow, Matrix<E> x, Index rows, const Weight<E> &weight,
                        const float *scale, const float *shift, const float *mean, Matrix<E> grad_x, E *grad_weight,
                        double *sums, int threads) {
  Index all = vectors_of(weight.in), ld = all * kW, depth = depth_of<T>(weight.out);
  // The prefix is made for a block of channels at a time, and many rows: the more rows, the less often the gradient of
  // the weight is read and written.
  Index block = all < kBlock ? all : kBlock, stride = (block | 1) * kW; // an odd number of lines of the cache
  Steps steps(rows, block * kW, threads);
  Index step = steps.rows, count = steps.count;
  Buffer<T> b = packed<T>(weight.data, 1, 0, weight.out, weight.out_stride, weight.in, weight.in_stride, threads);
  bool finished = flow.x.data;
  // Where it consists of elements, the gradient of the output is used where it lies; tiles of AMX read beyond it.
  bool in_place = !TILES && std::is_same<E, Scalar<T>>::value && weight.out % kScalars<T> == 0 &&
                  (finished || grad.ld % kScalars<T> == 0);
  int chunks = chunks_of(count, threads);
  std::vector<Sums<float>> parts(chunks, Sums<float>(weight.in));
  std::vector<Buffer<float>> weight_parts(chunks);
  for_chunks(chunks, [&](int chunk) {
    Buffer<T> copy(in_place ? 0 : (step + kRowsBehind) * depth), prefix(grad_weight ? step * stride : 0);
    Buffer<E> rest(finished ? step * weight.out : 0); // of the gradient, without what flows through the statistics
    Buffer<T> columns(grad_weight && kScalars<T> == 2 ? step * weight.out : 0);
    Buffer<T> turned(grad_weight && TILES ? (weight.out + kRowsBehind) * whole_vectors(depth_of<T>(step)) : 0);
    if (grad_weight)
      weight_parts[chunk] = zeros(weight.out * ld);
    double *totals = parts[chunk].totals.data();
    Range range(count, chunk, chunks);
    for (Index first = range.begin * step; first < range.end * step; first += step) {
      Index here = rows - first < step ? rows - first : step;
      Matrix<E> grad_here = from_row(grad, first), x_here = from_row(x, first);
      if (finished) {
        finish_rows(grad_here, flow.from(first), here, weight.out, {rest.data(), weight.out});
        grad_here = {rest.data(), weight.out};
      }
      Accumulation<E, kAdd> accumulation{x_here, from_row(grad_x, first), scale, shift, mean,
                                         totals, totals + weight.in};
      const T *a = reinterpret_cast<const T *>(grad_here.data);
      Index lda = grad_here.ld / kScalars<T>;
      if (!in_place) {
        fill_copy(grad_here, here, weight.out, depth, copy.data());
        a = copy.data(), lda = depth;
      }
      Lines<T> left{a, lda, 0};
      if constexpr (kScalars<T> == 2)
        if (grad_weight) { // a sum over rows: pairs are pairs of rows
          fill_pairs<false>(grad_here, here, weight.out, nullptr, nullptr, weight.out, columns.data());
          left = {columns.data(), weight.out, 0};
          if constexpr (TILES) {
            Index pairs = depth_of<T>(here), ld = whole_vectors(pairs);
            copy_transposed(columns.data(), weight.out, weight.out, pairs, ld, turned.data());
            left = {turned.data(), ld, 0};
          }
        }
      for (Index begin = 0, end; begin < all; begin = end) {
        for (end = begin; end < all && end + group_of(end, all) <= begin + block;)
          end += group_of(end, all);
        Index from = begin * kW, channels = (weight.in < end * kW ? weight.in : end * kW) - from;
        if (grad_weight) {
          Matrix<E> x_block{x_here.data + from, x.ld};
          if constexpr (kScalars<T> == 2)
            fill_pairs<true>(x_block, here, channels, scale + from, shift + from, stride, prefix.data());
          else
            fill_prefix(x_block, here, channels, scale + from, shift + from, stride, prefix.data());
          add_outer(left, weight.out, Lines<T>{prefix.data(), stride, 0}, channels, 1, depth_of<T>(here),
                    weight_parts[chunk].data() + from, ld);
        }
        Product<T>{a, lda, depth, b.data(), weight.in}.run(
            begin, end, tiles_of(here),
            [&](const Tile &tile) {
              if (tile.first == from) { // the next block, or the first of the next rows
                bool last = end == all;
                Index next = first + tile.row + (last ? step : 0);
                Index until = next + tile.rows < rows ? next + tile.rows : rows;
                Index at = last ? 0 : end * kW, wide = weight.in - at < block * kW ? weight.in - at : block * kW;
                fetch(from_channel(x, at), next, until, wide);
                if (last)
                  fetch(grad, next, until, weight.out);
                if (last && finished)
                  fetch(flow.x, next, until, weight.out);
              }
              accumulation.fetch_tile(tile);
            },
            [&](const Tile &tile) { accumulation.add(tile); });
      }
    }
  });
  add_up(parts, sums);
  if (grad_weight)
    gather_weight(weight_parts, ld, weight, grad_weight, threads);
}

END_LEVEL
