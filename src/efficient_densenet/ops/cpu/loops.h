// The passes before and after a convolution, of one loop each: they read and write what they must, once.
#pragma once

#include "vectors.h"

BEGIN_LEVEL

// ---- prologue ---------------------------------------------------------------------------------------------------

template <class E, class Out = E> struct PrologueBody {
  const E *x;
  Index ldx, rows, ldo;
  const Compute<E> *scale, *shift;
  Out *out;
  template <int W> void run(Index c) const {
    auto a = load<W>(scale + c), b = load<W>(shift + c);
    for (Index r = 0; r < rows; ++r)
      store<W>(out + r * ldo + c, rectify(load<W>(x + r * ldx + c) * a + b));
  }
};

template <class E>
void prologue(Matrix<E> x, Index rows, Index channels, const Compute<E> *scale, const Compute<E> *shift, E *out,
              int threads) {
  int chunks = chunks_for(rows, rows * channels, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(rows, chunk, chunks);
    for (Index r = range.begin; r < range.end; r += kTile) {
      Index n = range.end - r < kTile ? range.end - r : kTile;
      for_channels<widest<E>()>(
          0, channels, PrologueBody<E>{x.data + r * x.ld, x.ld, n, channels, scale, shift, out + r * channels});
    }
  });
}

// ---- copy and moments -------------------------------------------------------------------------------------------

template <class E> struct MomentsBody {
  const E *x;
  Index ldx, rows;
  const Compute<E> *pivot;
  E *out;
  Index ldo;
  Compute<E> *first, *second; // null: only copy
  template <int W> void run(Index c) const {
    using V = vector<Compute<E>, W>;
    V p{}, s1{}, s2{};
    if (first)
      p = load<W>(pivot + c), s1 = load<W>(first + c), s2 = load<W>(second + c);
    for (Index r = 0; r < rows; ++r) {
      V v = load<W>(x + r * ldx + c);
      if (out)
        store<W>(out + r * ldo + c, v);
      if (first) {
        V d = v - p;
        s1 += d;
        s2 += d * d;
      }
    }
    if (first)
      store<W>(first + c, s1), store<W>(second + c, s2);
  }
};

// A value near the mean of each channel, so that the squares of what is left do not cancel.
template <class E> struct PivotBody {
  const E *x;
  Index ldx, rows;
  Compute<E> *pivot;
  template <int W> void run(Index c) const {
    vector<Compute<E>, W> first = load<W>(x + c), sum{};
    for (Index r = 1; r < rows; ++r)
      sum += load<W>(x + r * ldx + c) - first;
    store<W>(pivot + c, first + sum * (Compute<E>(1) / rows));
  }
};

// Mean and squared deviations of rows that come one after the other; with no channels, nothing is gathered.
template <class S> struct Moments {
  Index channels, rows = 0;
  std::vector<S> pivot;
  Sums<S> sums;
  explicit Moments(Index channels) : channels(channels), pivot(channels), sums(channels) {}

  // Take in `n` rows of `width` channels, and copy them to `out` unless that is null.
  template <class E> void add(Matrix<E> x, Index n, Index width, Matrix<E> out) {
    if (channels && !rows && n)
      for_channels<widest<E>()>(0, width, PivotBody<E>{x.data, x.ld, n < 16 ? n : 16, pivot.data()});
    for (Index r = 0; r < n; r += kTile) {
      Index tile = n - r < kTile ? n - r : kTile;
      for_channels<widest<E>()>(0, width,
                                MomentsBody<E>{x.data + r * x.ld, x.ld, tile, pivot.data(),
                                               out.data ? out.data + r * out.ld : nullptr, out.ld,
                                               channels ? sums.first() : nullptr, channels ? sums.second() : nullptr});
      sums.added(tile);
    }
    if (sums.rows)
      sums.flush();
    rows += n;
  }
};

// `moments`, mean and variance of `before` rows, become those of these rows too; merged as Chan et al. do it.
template <class S> void merge_moments(const std::vector<Moments<S>> &parts, Index before, double *moments) {
  Index channels = parts.empty() ? 0 : parts[0].channels;
  for (Index c = 0; c < channels; ++c) {
    double n = before, mean = before ? moments[c] : 0, square = before ? moments[channels + c] * n : 0;
    for (const Moments<S> &part : parts) {
      if (!part.rows)
        continue;
      double m = part.rows, sum = part.sums.totals[c], shift = sum / m;
      double delta = part.pivot[c] + shift - mean;
      square += part.sums.totals[channels + c] - shift * sum + delta * delta * n * m / (n + m);
      mean += delta * m / (n + m);
      n += m;
    }
    moments[c] = mean;
    moments[channels + c] = n ? square / n : 0;
  }
}

template <class E>
void copy_moments(Matrix<E> x, Index rows, Index channels, Matrix<E> out, double *moments, Index before, int threads) {
  int chunks = chunks_for(rows, rows * channels, threads);
  std::vector<Moments<Compute<E>>> parts(chunks, Moments<Compute<E>>(moments ? channels : 0));
  for_chunks(chunks, [&](int chunk) {
    Range range(rows, chunk, chunks);
    Matrix<E> to{out.data ? out.data + range.begin * out.ld : nullptr, out.ld};
    parts[chunk].add(Matrix<E>{x.data + range.begin * x.ld, x.ld}, range.size(), channels, to);
  });
  if (moments)
    merge_moments(parts, before, moments);
}

// ---- gradients --------------------------------------------------------------------------------------------------

template <class E, bool kAdd, class G = E> struct AccumulateBody {
  const G *g;
  Index ldgrad;
  const E *x;
  Index ldx;
  E *grad_x;
  Index ldg;
  Index rows;
  const Compute<E> *scale, *shift, *mean;
  Compute<E> *first, *second;
  Compute<E> share = 1; // of the gradient, for each row
  template <int W> void run(Index c) const {
    using V = vector<Compute<E>, W>;
    V a = load<W>(scale + c), b = load<W>(shift + c), m = load<W>(mean + c);
    V s1 = load<W>(first + c), s2 = load<W>(second + c);
    for (Index r = 0; r < rows; ++r) {
      V v = load<W>(x + r * ldx + c);
      V d = where_positive(v * a + b, load<W>(g + r * ldgrad + c) * share);
      s1 += d;
      s2 += d * (v - m);
      V moved = a * d;
      if constexpr (kAdd)
        moved += load<W>(grad_x + r * ldg + c);
      store<W>(grad_x + r * ldg + c, moved);
    }
    store<W>(first + c, s1), store<W>(second + c, s2);
  }
};

template <bool kAdd, class E>
void accumulate(const E *g, Matrix<E> x, Index rows, Index channels, const Compute<E> *scale, const Compute<E> *shift,
                const Compute<E> *mean, Matrix<E> grad_x, double *sums, int threads) {
  int chunks = chunks_for(rows, rows * channels, threads);
  std::vector<Sums<Compute<E>>> parts(chunks, Sums<Compute<E>>(channels));
  for_chunks(chunks, [&](int chunk) {
    Range range(rows, chunk, chunks);
    Sums<Compute<E>> &part = parts[chunk];
    for (Index r = range.begin; r < range.end; r += kTile) {
      Index n = range.end - r < kTile ? range.end - r : kTile;
      for_channels<widest<E>()>(0, channels,
                                AccumulateBody<E, kAdd>{g + r * channels, channels, x.data + r * x.ld, x.ld,
                                                        grad_x.data + r * grad_x.ld, grad_x.ld, n, scale, shift, mean,
                                                        part.first(), part.second()});
      part.added(n);
    }
    part.flush();
  });
  add_up(parts, sums);
}

template <class E> struct FinishBody {
  const E *grad;
  Index ldg;
  const E *x;
  Index ldx;
  E *out;
  Index ldo;
  Index rows;
  const Compute<E> *mean, *constant, *slope;
  template <int W> void run(Index c) const {
    auto m = load<W>(mean + c), k = load<W>(constant + c), s = load<W>(slope + c);
    for (Index r = 0; r < rows; ++r)
      store<W>(out + r * ldo + c, load<W>(grad + r * ldg + c) - (load<W>(x + r * ldx + c) - m) * s - k);
  }
};

// What flows through the statistics of channels whose values are `x`, for each value; nothing where `x` is null.
template <class E> struct Flow {
  Matrix<E> x;
  const Compute<E> *mean, *constant, *slope;
  Flow from(Index row) const { return {from_row(x, row), mean, constant, slope}; }
};

template <class E> void finish_rows(Matrix<E> grad, const Flow<E> &flow, Index rows, Index channels, Matrix<E> out) {
  for (Index r = 0; r < rows; r += kTile)
    for_channels<widest<E>()>(0, channels,
                              FinishBody<E>{grad.data + r * grad.ld, grad.ld, flow.x.data + r * flow.x.ld, flow.x.ld,
                                            out.data + r * out.ld, out.ld, rows - r < kTile ? rows - r : kTile,
                                            flow.mean, flow.constant, flow.slope});
}

template <class E>
void finish(Matrix<E> grad, const Flow<E> &flow, Index rows, Index channels, Matrix<E> out, int threads) {
  int chunks = chunks_for(rows, rows * channels, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(rows, chunk, chunks);
    finish_rows(from_row(grad, range.begin), flow.from(range.begin), range.size(), channels,
                from_row(out, range.begin));
  });
}

END_LEVEL
