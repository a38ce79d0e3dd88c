// The kernels for whole norm–relu–convolutions, chosen by window and type.
//
// With a window of 3 they multiply values by zeros that the ordinary convolution leaves out, or spread them over a tile:
// infinite and undefined values are therefore left to PyTorch.
#pragma once

#include "pointwise.h"
#if PAIRS
#include "windowed.h"
#else
#include "winograd.h"
#endif

BEGIN_LEVEL

// Whether the kernel for a 3×3 window is faster than PyTorch's for images of this size.
template <class E> bool suits(Index height, Index width) {
#if PAIRS
  return height > 0 && width > 0;
#else
  return suits_winograd(height, width);
#endif
}

template <class E> bool is_finite(const Weight<E> &weight, const E *data, int threads) {
  Index n = weight.in * weight.taps; // it has no gaps, and may be cut into as many rows as there are outputs
  return is_finite(Matrix<const E>{data, n}, weight.out, n, threads);
}

// False, and nothing of use is done, where a result may not be right.
template <class E>
bool convolve_in_rows(Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale, const float *shift,
                      Matrix<E> out, double *moments, int threads, bool evaluates) {
  if (grid.window == 1) {
    pointwise<Operand<E>>(x, grid.rows(), weight, scale, shift, out, moments, threads, evaluates);
    return true;
  }
#if PAIRS
  if (!is_finite(weight, weight.data, threads))
    return false;
  windowed(x, grid, weight, scale, shift, out, moments, threads);
  return true;
#else
  return winograd(x, grid, weight, scale, shift, out, moments, threads);
#endif
}

// With so few rows, a good part of the time goes to packing the weights: each thread then packs those of its own outputs,
// and makes these. Threads wait less for each other, and less data moves between cores.
constexpr Index kFewRows = 200;

// False, and nothing of use is done, where a result may not be right. `evaluates`: neither batch statistics nor a backward
// pass follow, which would make the same values again.
template <class E>
bool convolve(Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale, const float *shift,
              Matrix<E> out, double *moments, int threads, bool evaluates = false) {
  Index vectors = vectors_of(weight.out);
  int chunks = chunks_of(vectors, threads);
  if (moments || chunks < 2 || grid.rows() > kFewRows)
    return convolve_in_rows(x, grid, weight, scale, shift, out, moments, threads, evaluates);
  std::vector<int> done(chunks);
  for_chunks(chunks, [&](int chunk) {
    Range range(vectors, chunk, chunks);
    Index first = range.begin * kW, stop = range.end * kW < weight.out ? range.end * kW : weight.out;
    Weight<E> part = weight;
    part.data += first * weight.out_stride, part.out = stop - first;
    done[chunk] = convolve_in_rows(x, grid, part, scale, shift, from_channel(out, first), nullptr, 1, evaluates);
  });
  for (int one : done)
    if (!one)
      return false;
  return true;
}

// The gradient of the weight for a window of 3 where values of the prefix are not finite: by its definition, value by value.
template <class E>
void weight_gradient_of_any(Matrix<E> grad, Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale,
                            const float *shift, E *grad_weight, int threads) {
  int chunks = chunks_for(weight.out, grid.rows() * weight.in * weight.out, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(weight.out, chunk, chunks);
    std::vector<double> sums(range.size() * 9 * weight.in);
    std::vector<float> s(weight.in);
    for (Index row = 0; row < grid.rows(); ++row) {
      for (Index c = 0; c < weight.in; ++c)
        s[c] = rectify(vector<float, 1>{value(x.data[row * x.ld + c]) * scale[c] + shift[c]})[0];
      Index pixel = row % grid.width, line = row / grid.width % grid.height;
      for (Index tap = 0; tap < 9; ++tap) {
        Index up = tap / 3 - 1, left = tap % 3 - 1; // from the row that reads to the one that is read
        if (line < up || line - up >= grid.height || pixel < left || pixel - left >= grid.width)
          continue;
        const E *here = grad.data + (row - up * grid.width - left) * grad.ld + range.begin;
        for (Index o = 0; o < range.size(); ++o)
          for (Index c = 0; c < weight.in; ++c)
            sums[(o * 9 + tap) * weight.in + c] += static_cast<double>(value(here[o])) * s[c];
      }
    }
    for (Index o = 0; o < range.size(); ++o)
      for (Index tap = 0; tap < 9; ++tap)
        for (Index c = 0; c < weight.in; ++c)
          set(grad_weight[(range.begin + o) * weight.out_stride + c * weight.in_stride + tap * weight.tap_stride],
              static_cast<float>(sums[(o * 9 + tap) * weight.in + c]));
  });
}

// False, and nothing of use is done, where a result may not be right. `flow` is subtracted from the gradient first.
template <bool kAdd, class E>
bool convolve_backward(Matrix<E> grad, const Flow<E> &flow, Matrix<E> x, const Grid &grid, const Weight<E> &weight,
                       const float *scale, const float *shift, const float *mean, Matrix<E> grad_x, E *grad_weight,
                       double *sums, int threads) {
  if (grid.window == 1) {
    pointwise_backward<Operand<E>, kAdd>(grad, flow, x, grid.rows(), weight, scale, shift, mean, grad_x, grad_weight,
                                         sums, threads);
    return true;
  }
  if (flow.x.data)
    finish(grad, flow, grid.rows(), weight.out, grad, threads);
  if (!is_finite(weight, weight.data, threads))
    return false;
#if PAIRS
  windowed_backward<kAdd>(grad, x, grid, weight, scale, shift, mean, grad_x, grad_weight, sums, threads);
#else
  if (!is_finite(grad, grid.rows(), weight.out, threads))
    return false;
  winograd_backward<kAdd>(grad, x, grid, weight, scale, shift, mean, grad_x, grad_weight, sums, threads);
#endif
  if (grad_weight && !is_finite(weight, static_cast<const E *>(grad_weight), threads))
    weight_gradient_of_any(grad, x, grid, weight, scale, shift, grad_weight, threads);
  return true;
}

END_LEVEL
