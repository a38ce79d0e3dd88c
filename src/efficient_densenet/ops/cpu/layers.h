// The layers of a dense block, forward and backward, without leaving the native code between them, and in evaluation what
// follows the block too: what execution/stage.py does layer by layer, where nothing but the kernels of whole convolutions
// is needed.
#pragma once

#include "convolve.h"
#include "loops.h"
#include "mean.h"

BEGIN_LEVEL

inline Grid grid_of(const Convolution &c) { return {c.images, c.height, c.width, c.window}; }
template <class E> Weight<E> weight_of(const Convolution &c, const void *data) {
  const E *values = static_cast<const E *>(data);
  return {values, c.outputs, c.inputs, c.window * c.window, c.output_stride, c.input_stride, c.tap_stride};
}

// What every reader of the layers has in common.
template <class E> class Block {
  using S = float; // there are kernels of whole convolutions for types that are computed in single precision
  const Layers &layers;
  int threads;

  static S *vector(void *data) { return static_cast<S *>(data); }
  static const S *vector(const void *data) { return static_cast<const S *>(data); }
  const Reader &reader(Index i) const { return layers.readers[i]; }
  // The last reader of a layer makes its features.
  bool is_last(Index i) const { return i % layers.per_layer == layers.per_layer - 1; }

  struct Norm {
    const S *mean;
    S *inverse, *scale, *shift;
  };
  // `at`: the channels that the norms before it read.
  Norm norm(Index i, Index at) const {
    const Reader &r = reader(i);
    return {r.mean ? vector(r.mean) : vector(layers.means) + r.first, vector(layers.inverse) + at,
            vector(layers.scale) + at, vector(layers.shift) + at};
  }
  // What a reader reads, and what it makes, where the features that its layer reads end at `width`.
  Matrix<E> source(Index i) const {
    if (i % layers.per_layer)
      return {static_cast<E *>(reader(i - 1).bottleneck), reader(i).convolution.inputs};
    return {static_cast<E *>(layers.features.data), layers.features.ld};
  }
  Matrix<E> made(Index i, Index width) const {
    if (!is_last(i))
      return {static_cast<E *>(reader(i).bottleneck), reader(i).convolution.outputs};
    return {static_cast<E *>(layers.features.data) + width, layers.features.ld};
  }
  bool run(Index i, Index at, Index width, double *moments) const {
    const Convolution &c = reader(i).convolution;
    Norm n = norm(i, at);
    return convolve(source(i), grid_of(c), weight_of<E>(c, reader(i).weight), n.scale, n.shift, made(i, width), moments,
                    threads);
  }

  // What flows through the statistics of some channels, as all of their readers have gathered it.
  struct Through {
    Matrix<E> x{};
    const S *mean = nullptr;
    std::vector<S> constant, slope;
    Through() = default;
    Through(const LayersBackward &b, const Layers &layers, Matrix<E> x, Index first, Index channels)
        : x(x), mean(vector(layers.means) + first), constant(channels), slope(channels) {
      for (Index c = 0; c < channels; ++c) {
        constant[c] = vector(b.constant)[first + c] / *vector(b.values);
        slope[c] = vector(b.slope)[first + c] / *vector(b.values);
      }
    }
    Flow<E> flow() const { return {x, mean, constant.data(), slope.data()}; }
  };

public:
  Block(const Layers &layers, int threads) : layers(layers), threads(threads) {}

  int forward(bool fold, bool measure) const {
    Index width = layers.width, at = 0;
    std::vector<double> moments;
    for (Index i = 0; i < layers.count; ++i) {
      const Reader &r = reader(i);
      Index outputs = r.convolution.outputs;
      Norm n = norm(i, at);
      if (fold)
        fold_norm(n.mean, r.variance ? vector(r.variance) : vector(layers.variances) + r.first, vector(r.norm_weight),
                  vector(r.norm_bias), r.eps, r.convolution.inputs, n.inverse, n.scale, n.shift);
      moments.assign(2 * outputs, 0);
      if (!run(i, at, width, measure ? moments.data() : nullptr))
        return static_cast<int>(i / layers.per_layer);
      Index channel = is_last(i) ? width : reader(i + 1).first;
      for (Index c = 0; measure && c < outputs; ++c) {
        vector(layers.means)[channel + c] = static_cast<S>(moments[c]);
        vector(layers.variances)[channel + c] = static_cast<S>(moments[outputs + c]);
      }
      at += r.convolution.inputs;
      width += is_last(i) ? outputs : 0;
    }
    return static_cast<int>(layers.count / layers.per_layer);
  }

  int backward(const LayersBackward &b) const {
    Index width = layers.width, at = 0, done = 0;
    for (Index i = 0; i < layers.count; ++i) {
      at += reader(i).convolution.inputs;
      width += is_last(i) ? reader(i).convolution.outputs : 0;
    }
    Matrix<E> grad{static_cast<E *>(b.grad.data), b.grad.ld}, features = source(0);
    for (Index i = layers.count - 1; i >= b.start * layers.per_layer; --i, ++done) {
      const Reader *last = &reader(i);
      width -= last->convolution.outputs, at -= last->convolution.inputs;
      Matrix<E> grad_made{grad.data + width, grad.ld};
      Through through; // what is still to be subtracted from it
      if (layers.per_layer == 2) {
        const Reader &first = reader(i - 1);
        Index channels = last->convolution.inputs, before = at - first.convolution.inputs;
        Matrix<E> grad_bottleneck{static_cast<E *>(b.grad_bottleneck), channels};
        if (b.made_again && !run(i - 1, before, width, nullptr))
          return static_cast<int>(done);
        if (!differentiate<false>(i, at, grad_made, through, grad_bottleneck, b))
          return static_cast<int>(done);
        if (b.constant && !last->mean)
          through = Through(b, layers, source(i), last->first, channels);
        grad_made = grad_bottleneck;
        at = before, --i;
      }
      if (!differentiate<true>(i, at, grad_made, through, grad, b))
        return static_cast<int>(done);
      if (i && b.constant && width <= b.used) { // the features of the layer whose turn is next
        Index channels = reader(i - 1).convolution.outputs, from = width - channels;
        Matrix<E> next{grad.data + from, grad.ld};
        Through of_next(b, layers, {features.data + from, features.ld}, from, channels);
        finish(next, of_next.flow(), grid_of(reader(0).convolution).rows(), channels, next, threads);
      }
    }
    return static_cast<int>(done);
  }

private:
  // Backward through reader `i`, and the gradients of its norm.
  template <bool kAdd>
  bool differentiate(Index i, Index at, Matrix<E> grad_made, const Through &through, Matrix<E> grad_source,
                     const LayersBackward &b) const {
    const Reader &r = reader(i);
    const Convolution &c = r.convolution;
    Norm n = norm(i, at);
    std::vector<double> sums(2 * c.inputs);
    if (!convolve_backward<kAdd>(grad_made, through.flow(), source(i), grid_of(c), weight_of<E>(c, r.weight), n.scale,
                                 n.shift, n.mean, grad_source, static_cast<E *>(r.grad_weight), sums.data(), threads))
      return false;
    bool flows = b.constant && !r.mean;
    norm_gradients(n.inverse, n.scale, sums.data(), c.inputs, vector(b.grad_norm_weight) + at,
                   vector(b.grad_norm_bias) + at, flows ? vector(b.constant) + r.first : nullptr,
                   flows ? vector(b.slope) + r.first : nullptr);
    return true;
  }
};

// A block in evaluation, with the transition or the head behind it.
template <class E> bool evaluate(const Evaluation &e, int threads) {
  std::vector<Reader> readers(e.layers.readers, e.layers.readers + e.layers.count);
  Index inputs = e.end ? e.end->convolution.inputs : 0;
  for (Reader &reader : readers) {
    inputs += reader.convolution.inputs;
    reader.bottleneck = e.scratch;
  }
  std::vector<float> inverse(inputs), scale(inputs), shift(inputs);
  Layers layers = e.layers;
  layers.readers = readers.data();
  layers.inverse = inverse.data(), layers.scale = scale.data(), layers.shift = shift.data();
  auto matrix = [](Rows rows) { return Matrix<E>{static_cast<E *>(rows.data), rows.ld}; };
  Matrix<E> features = matrix(layers.features), out = matrix(e.out);
  const Convolution &c = readers[0].convolution;
  Index rows = grid_of(c).rows();
  if (e.x.data)
    copy_moments(matrix(e.x), rows, layers.width, features, nullptr, 0, threads);
  if (Block<E>(layers, threads).forward(true, false) < layers.count / layers.per_layer)
    return false;
  if (!e.end)
    return true;
  auto vector = [](const void *data) { return static_cast<const float *>(data); };
  const Reader &end = *e.end;
  Index channels = end.convolution.inputs;
  fold_norm(vector(end.mean), vector(end.variance), vector(end.norm_weight), vector(end.norm_bias), end.eps, channels,
            inverse.data(), scale.data(), shift.data());
  if (!end.convolution.outputs) {
    mean(features, c.images, rows / c.images, channels, scale.data(), shift.data(), out, threads);
    return true;
  }
  if (pixels_of_window(e.pool) > 1) { // what it makes is not negative: another rectifier changes nothing
    prologue_pool(features, e.pool, channels, scale.data(), shift.data(), static_cast<E *>(e.scratch), threads);
    features = {static_cast<E *>(e.scratch), channels};
    scale.assign(channels, 1), shift.assign(channels, 0);
  }
  return convolve(features, grid_of(end.convolution), weight_of<E>(end.convolution, end.weight), scale.data(), shift.data(),
                  out, nullptr, threads);
}

END_LEVEL
