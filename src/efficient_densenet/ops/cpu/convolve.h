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
  Index n = weight.out * weight.in * weight.taps; // it has no gaps
  return is_finite(Matrix<const E>{data, n}, 1, n, threads);
}

// False, and nothing of use is done, where a result may not be right.
template <class E>
bool convolve(Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale, const float *shift,
              Matrix<E> out, double *moments, int threads) {
  if (grid.window == 1) {
    pointwise<Operand<E>>(x, grid.rows(), weight, scale, shift, out, moments, threads);
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

template <bool kAdd, class E>
Backward convolve_backward(Matrix<E> grad, Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale,
                           const float *shift, const float *mean, Matrix<E> grad_x, E *grad_weight, double *sums,
                           int threads) {
  if (grid.window == 1) {
    pointwise_backward<Operand<E>, kAdd>(grad, x, grid.rows(), weight, scale, shift, mean, grad_x, grad_weight, sums,
                                         threads);
    return kDone;
  }
  if (!is_finite(weight, weight.data, threads))
    return kNothingDone;
#if PAIRS
  windowed_backward<kAdd>(grad, x, grid, weight, scale, shift, mean, grad_x, grad_weight, sums, threads);
#else
  if (!is_finite(grad, grid.rows(), weight.out, threads))
    return kNothingDone;
  winograd_backward<kAdd>(grad, x, grid, weight, scale, shift, mean, grad_x, grad_weight, sums, threads);
#endif
  return !grad_weight || is_finite(weight, static_cast<const E *>(grad_weight), threads) ? kDone : kNoWeight;
}

END_LEVEL
