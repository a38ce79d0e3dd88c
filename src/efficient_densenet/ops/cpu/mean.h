// The head: norm, relu and the mean over all pixels of an image.
//
// All pixels of an image get the same gradient, so that its sum in single precision would round in the same direction
// again and again: pixels are counted instead, and multiplied by the gradient in double precision.
#pragma once

#include "vectors.h"

BEGIN_LEVEL

template <class E> struct MeanBody {
  const E *x;
  Index ldx, rows;
  const Compute<E> *scale, *shift;
  Compute<E> *sum;
  template <int W> void run(Index c) const {
    auto a = load<W>(scale + c), b = load<W>(shift + c), s = load<W>(sum + c);
    for (Index r = 0; r < rows; ++r)
      s += rectify(load<W>(x + r * ldx + c) * a + b);
    store<W>(sum + c, s);
  }
};

template <class E>
void mean(Matrix<E> x, Index images, Index pixels, Index channels, const Compute<E> *scale, const Compute<E> *shift,
          Matrix<E> out, int threads) {
  int chunks = chunks_for(images, images * pixels * channels, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(images, chunk, chunks);
    for (Index n = range.begin; n < range.end; ++n) {
      Sums<Compute<E>> sums(channels);
      for (Index p = 0; p < pixels; p += kRowsPerSum) {
        Index rows = pixels - p < kRowsPerSum ? pixels - p : kRowsPerSum;
        for_channels<widest<E>()>(
            0, channels, MeanBody<E>{x.data + (n * pixels + p) * x.ld, x.ld, rows, scale, shift, sums.first()});
        sums.flush();
      }
      for (Index c = 0; c < channels; ++c) {
        Compute<E> value = static_cast<Compute<E>>(sums.totals[c] / pixels);
        store<1>(out.data + n * out.ld + c, vector<Compute<E>, 1>{value});
      }
    }
  });
}

// grad_x = scale·share where a pixel is positive; counts these pixels, and sums up their x − mean.
template <class E> struct MeanBackwardBody {
  const E *x;
  Index ldx;
  E *grad_x;
  Index ldg, rows;
  const Compute<E> *scale, *shift, *mean, *share;
  Compute<E> *count, *centred;
  template <int W> void run(Index c) const {
    using V = vector<Compute<E>, W>;
    V a = load<W>(scale + c), b = load<W>(shift + c), m = load<W>(mean + c), moved = a * load<W>(share + c);
    V n = load<W>(count + c), s = load<W>(centred + c);
    for (Index r = 0; r < rows; ++r) {
      V v = load<W>(x + r * ldx + c), normed = v * a + b;
      n += where_positive(normed, V{} + 1);
      s += where_positive(normed, v - m);
      store<W>(grad_x + r * ldg + c, where_positive(normed, moved));
    }
    store<W>(count + c, n), store<W>(centred + c, s);
  }
};

template <class E>
void mean_backward(Matrix<E> grad, Matrix<E> x, Index images, Index pixels, Index channels, const Compute<E> *scale,
                   const Compute<E> *shift, const Compute<E> *mean, Matrix<E> grad_x, double *sums, int threads) {
  int chunks = chunks_for(images, images * pixels * channels, threads);
  std::vector<Sums<Compute<E>>> parts(chunks, Sums<Compute<E>>(channels));
  for_chunks(chunks, [&](int chunk) {
    Range range(images, chunk, chunks);
    std::vector<Compute<E>> share(channels);
    for (Index n = range.begin; n < range.end; ++n) {
      Sums<Compute<E>> here(channels);
      for (Index c = 0; c < channels; ++c)
        share[c] = load<1>(grad.data + n * grad.ld + c)[0] / pixels;
      for (Index p = 0; p < pixels; p += kRowsPerSum) {
        Index row = n * pixels + p, rows = pixels - p < kRowsPerSum ? pixels - p : kRowsPerSum;
        for_channels<widest<E>()>(0, channels,
                                  MeanBackwardBody<E>{x.data + row * x.ld, x.ld, grad_x.data + row * grad_x.ld,
                                                      grad_x.ld, rows, scale, shift, mean, share.data(), here.first(),
                                                      here.second()});
        here.flush();
      }
      for (Index c = 0; c < channels; ++c) {
        if (here.totals[c] == 0)
          continue; // an infinite gradient that no pixel lets through is none
        parts[chunk].totals[c] += here.totals[c] * share[c];
        parts[chunk].totals[channels + c] += here.totals[channels + c] * share[c];
      }
    }
  });
  add_up(parts, sums);
}

END_LEVEL
