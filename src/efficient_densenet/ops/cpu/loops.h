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

// ---- prologue and average pool ----------------------------------------------------------------------------------

// The windows of an average pool.
inline Index planes_out(const Volume &v) { return v.planes / v.plane_window; }
inline Index lines_out(const Volume &v) { return v.lines / v.line_window; }
inline Index pixels_out(const Volume &v) { return v.pixels / v.pixel_window; }
inline Index pixels_of_window(const Volume &v) { return v.plane_window * v.line_window * v.pixel_window; }

// Calls work(row of the output, row of the window's first pixel) for the lines of the output in a chunk.
template <class Work> void for_windows(const Volume &v, int chunk, int chunks, const Work &work) {
  Range range(v.images * planes_out(v) * lines_out(v), chunk, chunks);
  for (Index line = range.begin; line < range.end; ++line) {
    Index y = line % lines_out(v), z = line / lines_out(v) % planes_out(v), n = line / lines_out(v) / planes_out(v);
    Index first = ((n * v.planes + z * v.plane_window) * v.lines + y * v.line_window) * v.pixels;
    for (Index x = 0; x < pixels_out(v); ++x)
      work(line * pixels_out(v) + x, first + x * v.pixel_window);
  }
}

// The rows of a window, relative to its first.
inline std::vector<Index> window_rows(const Volume &v) {
  std::vector<Index> rows;
  for (Index z = 0; z < v.plane_window; ++z)
    for (Index y = 0; y < v.line_window; ++y)
      for (Index x = 0; x < v.pixel_window; ++x)
        rows.push_back((z * v.lines + y) * v.pixels + x);
  return rows;
}

template <class E> struct ProloguePoolBody {
  const E *x;
  Index ldx;
  const std::vector<Index> &window;
  const Compute<E> *scale, *shift;
  E *out;
  template <int W> void run(Index c) const {
    auto a = load<W>(scale + c), b = load<W>(shift + c);
    vector<Compute<E>, W> sum{};
    for (Index row : window)
      sum += rectify(load<W>(x + row * ldx + c) * a + b);
    store<W>(out + c, sum * (Compute<E>(1) / window.size()));
  }
};

template <class E>
void prologue_pool(Matrix<E> x, const Volume &v, Index channels, const Compute<E> *scale, const Compute<E> *shift,
                   E *out, int threads) {
  std::vector<Index> window = window_rows(v);
  Index lines = v.images * planes_out(v) * lines_out(v);
  int chunks = chunks_for(lines, lines * pixels_out(v) * channels * pixels_of_window(v), threads);
  for_chunks(chunks, [&](int chunk) {
    for_windows(v, chunk, chunks, [&](Index to, Index from) {
      for_channels<widest<E>()>(
          0, channels,
          ProloguePoolBody<E>{x.data + from * x.ld, x.ld, window, scale, shift, out + to * channels});
    });
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
    Index since_flush = 0;
    for (Index r = 0; r < n; r += kTile) {
      Index tile = n - r < kTile ? n - r : kTile;
      for_channels<widest<E>()>(0, width,
                                MomentsBody<E>{x.data + r * x.ld, x.ld, tile, pivot.data(),
                                               out.data ? out.data + r * out.ld : nullptr, out.ld,
                                               channels ? sums.first() : nullptr, channels ? sums.second() : nullptr});
      if (channels && ((since_flush += tile) >= kRowsPerSum || r + tile == n))
        sums.flush(), since_flush = 0;
    }
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

// Adds the sums of all chunks to `into`, in the order of the chunks.
template <class S> void add_up(const std::vector<Sums<S>> &parts, double *into) {
  for (const Sums<S> &part : parts)
    for (std::size_t i = 0; i < part.totals.size(); ++i)
      into[i] += part.totals[i];
}

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

template <class E, bool kAdd>
void accumulate_rows(const E *g, Matrix<E> x, Index rows, Index channels, const Compute<E> *scale,
                     const Compute<E> *shift, const Compute<E> *mean, Matrix<E> grad_x, double *sums, int threads) {
  int chunks = chunks_for(rows, rows * channels, threads);
  std::vector<Sums<Compute<E>>> parts(chunks, Sums<Compute<E>>(channels));
  for_chunks(chunks, [&](int chunk) {
    Range range(rows, chunk, chunks);
    Sums<Compute<E>> &part = parts[chunk];
    Index since_flush = 0;
    for (Index r = range.begin; r < range.end; r += kTile) {
      Index n = range.end - r < kTile ? range.end - r : kTile;
      for_channels<widest<E>()>(0, channels,
                                AccumulateBody<E, kAdd>{g + r * channels, channels, x.data + r * x.ld, x.ld,
                                                        grad_x.data + r * grad_x.ld, grad_x.ld, n, scale, shift, mean,
                                                        part.first(), part.second()});
      if ((since_flush += n) >= kRowsPerSum)
        part.flush(), since_flush = 0;
    }
    part.flush();
  });
  add_up(parts, sums);
}

template <class E>
void accumulate(const E *g, Matrix<E> x, Index rows, Index channels, const Compute<E> *scale, const Compute<E> *shift,
                const Compute<E> *mean, Matrix<E> grad_x, bool add, double *sums, int threads) {
  (add ? accumulate_rows<E, true> : accumulate_rows<E, false>)(g, x, rows, channels, scale, shift, mean, grad_x, sums,
                                                              threads);
}

template <class E, bool kAdd>
void accumulate_windows(const E *g, Matrix<E> x, const Volume &v, Index channels, const Compute<E> *scale,
                        const Compute<E> *shift, const Compute<E> *mean, Matrix<E> grad_x, double *sums, int threads) {
  std::vector<Index> window = window_rows(v);
  Compute<E> share = Compute<E>(1) / window.size();
  Index lines = v.images * planes_out(v) * lines_out(v);
  int chunks = chunks_for(lines, lines * pixels_out(v) * channels * pixels_of_window(v), threads);
  std::vector<Sums<Compute<E>>> parts(chunks, Sums<Compute<E>>(channels));
  for_chunks(chunks, [&](int chunk) {
    Sums<Compute<E>> &part = parts[chunk];
    Index since_flush = 0;
    for_windows(v, chunk, chunks, [&](Index to, Index from) {
      for (Index row : window)
        for_channels<widest<E>()>(0, channels,
                                  AccumulateBody<E, kAdd>{g + to * channels, 0, x.data + (from + row) * x.ld, x.ld,
                                                          grad_x.data + (from + row) * grad_x.ld, grad_x.ld, 1, scale,
                                                          shift, mean, part.first(), part.second(), share});
      if ((since_flush += pixels_of_window(v)) >= kRowsPerSum)
        part.flush(), since_flush = 0;
    });
    part.flush();
  });
  add_up(parts, sums);
}

template <class E>
void accumulate_pool(const E *g, Matrix<E> x, const Volume &v, Index channels, const Compute<E> *scale,
                     const Compute<E> *shift, const Compute<E> *mean, Matrix<E> grad_x, bool add, double *sums,
                     int threads) {
  (add ? accumulate_windows<E, true> : accumulate_windows<E, false>)(g, x, v, channels, scale, shift, mean, grad_x,
                                                                    sums, threads);
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

// ---- folding a norm ---------------------------------------------------------------------------------------------

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

END_LEVEL
