// The layers of a dense block, forward and backward, without leaving the native code between them, and in evaluation what
// follows the block too: what execution/stage.py does layer by layer, where nothing but the kernels of whole convolutions
// is needed.
#pragma once

#include "average_pool.h"
#include "convolve.h"
#include "mean.h"
#include "norms.h"

BEGIN_LEVEL

inline Grid grid_of(const Convolution &c) { return {c.images, c.height, c.width, c.window}; }
template <class E> Weight<E> weight_of(const Convolution &c, const void *data) {
  const E *values = static_cast<const E *>(data);
  return {values, c.outputs, c.inputs, c.window * c.window, c.output_stride, c.input_stride, c.tap_stride};
}

// The layers, reader by reader.
template <class E> class Block : Passed<E> {
  using S = float; // there are kernels of whole convolutions for types that are computed in single precision
  using Passed<E>::matrix, Passed<E>::vector;
  const Layers &layers;
  int threads;
  bool evaluates;

  const Reader &reader(Index i) const { return layers.readers[i]; }
  // The last reader of a layer makes its features.
  bool is_last(Index i) const { return i % layers.per_layer == layers.per_layer - 1; }

  struct Norm {
    const S *mean;
    S *inverse, *scale, *shift;
  };
  // `at`: the channels that the norms before it read.
  Norm norm(const Reader &r, Index at) const {
    return {r.mean ? vector(r.mean) : vector(layers.means) + r.first, vector(layers.inverse) + at,
            vector(layers.scale) + at, vector(layers.shift) + at};
  }
  void fold(const Reader &r, Norm n) const {
    fold_norm(n.mean, r.variance ? vector(r.variance) : vector(layers.variances) + r.first, vector(r.norm_weight),
              vector(r.norm_bias), r.eps, r.convolution.inputs, n.inverse, n.scale, n.shift);
  }
  // What a reader reads, and what it makes, where the features that its layer reads end at `width`.
  Matrix<E> source(Index i) const { return i % layers.per_layer ? bottleneck(i - 1) : matrix(layers.features); }
  Matrix<E> made(Index i, Index width) const {
    return is_last(i) ? from_channel(matrix(layers.features), width) : bottleneck(i);
  }
  Matrix<E> bottleneck(Index i) const {
    return {static_cast<E *>(reader(i).bottleneck), reader(i).convolution.outputs};
  }
  bool run(Index i, Index at, Index width, double *moments) const {
    const Convolution &c = reader(i).convolution;
    Norm n = norm(reader(i), at);
    return convolve(source(i), grid_of(c), weight_of<E>(c, reader(i).weight), n.scale, n.shift, made(i, width), moments,
                    threads, evaluates);
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
  Block(const Layers &layers, int threads, bool evaluates = false)
      : layers(layers), threads(threads), evaluates(evaluates) {}

  int forward(bool fold_norms, bool measure) const {
    Index width = layers.width, at = 0;
    std::vector<double> moments;
    for (Index i = 0; i < layers.count; ++i) {
      const Reader &r = reader(i);
      Index outputs = r.convolution.outputs;
      if (fold_norms)
        fold(r, norm(r, at));
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
    Matrix<E> grad = matrix(b.grad), features = matrix(layers.features);
    for (Index i = layers.count - 1; i >= b.start * layers.per_layer; --i, ++done) {
      const Reader *last = &reader(i);
      width -= last->convolution.outputs, at -= last->convolution.inputs;
      Matrix<E> grad_made = from_channel(grad, width);
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
        Matrix<E> next = from_channel(grad, from);
        Through of_next(b, layers, from_channel(features, from), from, channels);
        finish(next, of_next.flow(), grid_of(reader(0).convolution).rows(), channels, next, threads);
      }
    }
    return static_cast<int>(done);
  }

  // A block in evaluation, with the transition or the head behind it.
  static bool evaluate(const Evaluation &e, int threads) {
    std::vector<Reader> readers(e.layers.readers, e.layers.readers + e.layers.count);
    Index inputs = e.end ? e.end->convolution.inputs : 0;
    for (Reader &reader : readers) {
      inputs += reader.convolution.inputs;
      reader.bottleneck = e.scratch;
    }
    std::vector<S> inverse(inputs), scale(inputs), shift(inputs);
    Layers layers = e.layers;
    layers.readers = readers.data();
    layers.inverse = inverse.data(), layers.scale = scale.data(), layers.shift = shift.data();
    if (e.x.data)
      copy_moments(matrix(e.x), grid_of(readers[0].convolution).rows(), layers.width, matrix(layers.features), nullptr, 0,
                   threads);
    Block block(layers, threads, true);
    if (block.forward(true, false) < layers.count / layers.per_layer)
      return false;
    return !e.end || block.evaluate_end(e);
  }

private:
  // The transition or the head. Its folded norm overwrites those of the layers, which are done.
  bool evaluate_end(const Evaluation &e) const {
    const Reader &end = *e.end;
    const Convolution &c = end.convolution;
    Matrix<E> features = matrix(layers.features), out = matrix(e.out);
    Norm n = norm(end, 0);
    fold(end, n);
    if (!c.outputs) {
      mean(features, c.images, c.height * c.width, c.inputs, n.scale, n.shift, out, threads);
      return true;
    }
    if (pixels_of_window(e.pool) > 1) { // what it makes is not negative: another rectifier changes nothing
      prologue_pool(features, e.pool, c.inputs, n.scale, n.shift, static_cast<E *>(e.scratch), threads);
      features = {static_cast<E *>(e.scratch), c.inputs};
      for (Index i = 0; i < c.inputs; ++i)
        n.scale[i] = 1, n.shift[i] = 0;
    }
    return convolve(features, grid_of(c), weight_of<E>(c, end.weight), n.scale, n.shift, out, nullptr, threads);
  }

  // Backward through reader `i`, and the gradients of its norm.
  template <bool kAdd>
  bool differentiate(Index i, Index at, Matrix<E> grad_made, const Through &through, Matrix<E> grad_source,
                     const LayersBackward &b) const {
    const Reader &r = reader(i);
    const Convolution &c = r.convolution;
    Norm n = norm(r, at);
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

END_LEVEL
