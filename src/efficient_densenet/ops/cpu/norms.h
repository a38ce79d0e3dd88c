// A norm on vectors of one value for each channel: it is folded to a scale and a shift, and its gradients follow from sums.
#pragma once

#include "level.h"

BEGIN_LEVEL

// In double precision, for an error in these is one of a whole channel, which no sum makes smaller. The shift belongs to
// the scale as it was rounded. What is written is not read, and no square root sets `errno`: compilers make vectors of it.
template <class S>
void fold_norm(const S *mean, const S *variance, const S *weight, const S *bias, double eps, Index channels,
               S *__restrict inverse, S *__restrict scale, S *__restrict shift) {
  for (Index c = 0; c < channels; ++c) {
    double exact = 1 / std::sqrt(variance[c] + eps);
    inverse[c] = static_cast<S>(exact);
    scale[c] = static_cast<S>(weight[c] * exact);
    shift[c] = static_cast<S>(bias[c] - static_cast<double>(mean[c]) * scale[c]);
  }
}

// From Σg and Σg·(x − mean), in `sums`: the gradients of a norm's weight and bias; and unless they are null, what flows
// through the statistics is added to `constant` and `slope`, scale·Σg and scale·inverse²·Σg·(x − mean).
template <class S>
void norm_gradients(const S *inverse, const S *scale, const double *sums, Index channels, S *grad_weight, S *grad_bias,
                    S *constant, S *slope) {
  for (Index c = 0; c < channels; ++c) {
    S g = static_cast<S>(sums[c]), centred = static_cast<S>(sums[channels + c]);
    grad_weight[c] = inverse[c] * centred, grad_bias[c] = g;
    if (constant)
      constant[c] += scale[c] * g, slope[c] += scale[c] * (inverse[c] * inverse[c]) * centred;
  }
}

END_LEVEL
