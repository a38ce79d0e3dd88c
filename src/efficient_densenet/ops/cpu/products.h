// Convolutions as matrix products whose operands are made and used in the cache, included beside `loops.h`.
//
// A unit of work is a few lines of one image (for a 1×1 convolution: a few rows of the whole matrix). Its rectified
// prefix is made in a scratch of the thread, with a border of zeros where the window reaches beyond the image, and
// consumed from there. Tiles of the result stay in registers: `kRows` rows times a few vectors.

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

constexpr int kW = kVectorBytes / 4; // values of a vector
using Vector = vector<float, kW>;

inline float value(const float &x) { return x; }
inline float value(const bf16 &x) { return load<1>(&x)[0]; }
template <class E> inline void set(E &x, float value) { store<1>(&x, vector<float, 1>{value}); }

inline Index vectors_of(Index channels) { return (channels + kW - 1) / kW; }

// acc[r][j] += Σ_k a[r·lda + k] · b[k][j]: rows of `a` against a packed block of NV vectors.
template <int MR, int NV>
inline __attribute__((always_inline)) void add_rows(const float *a, Index lda, const float *b, Index n,
                                                    Vector (&acc)[MR][NV]) {
  for (Index k = 0; k < n; ++k) {
    Vector v[NV];
    UNROLL for (int j = 0; j < NV; ++j) v[j] = load<kW>(b + (k * NV + j) * kW);
    UNROLL for (int r = 0; r < MR; ++r) {
      float s = a[r * lda + k];
      UNROLL for (int j = 0; j < NV; ++j) acc[r][j] += s * v[j];
    }
  }
}

// acc[r][j] += Σ_p a[p·lda + r] · b[p·ldb + j]: columns of `a` against columns of `b`.
template <int MR, int NV>
inline __attribute__((always_inline)) void add_columns(const float *a, Index lda, const float *b, Index ldb, Index n,
                                                       Vector (&acc)[MR][NV]) {
  for (Index p = 0; p < n; ++p) {
    Vector v[NV];
    UNROLL for (int j = 0; j < NV; ++j) v[j] = load<kW>(b + p * ldb + j * kW);
    UNROLL for (int r = 0; r < MR; ++r) {
      float s = a[p * lda + r];
      UNROLL for (int j = 0; j < NV; ++j) acc[r][j] += s * v[j];
    }
  }
}

// body.run<MR, NV>() for sizes known at run time.
template <int MR, int NV, class Body> inline void with_rows(int rows, const Body &body) {
  if (rows == MR)
    body.template run<MR, NV>();
  else if constexpr (MR > 1)
    with_rows<MR - 1, NV>(rows, body);
}

// Rows of a tile for its number of vectors, so that all of it stays in registers.
constexpr int tile_rows(int vectors) { return vectors == 1 ? 14 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6; }

template <class Body> inline void with_tile(int rows, int vectors, const Body &body) {
  switch (vectors) {
  case 1:
    return with_rows<tile_rows(1), 1>(rows, body);
  case 2:
    return with_rows<tile_rows(2), 2>(rows, body);
  case 3:
    return with_rows<tile_rows(3), 3>(rows, body);
  default:
    return with_rows<tile_rows(4), 4>(rows, body);
  }
}

// Vectors in the group that begins at vector `j` of `all`: at most so many, in groups of nearly one size.
inline int group_of(Index j, Index all, Index most = 4) {
  Index left = all - j, groups = (left + most - 1) / most;
  return static_cast<int>((left + groups - 1) / groups);
}

// Packed for `add_rows`: [group][tap][k][vectors of the group, at most `most`], zeros beyond `n`; taken from
// data[tap·tap_stride + k·k_stride + i·n_stride]. In small squares, for one side or the other is far apart in memory.
template <class E>
std::vector<float> packed(const E *data, Index taps, Index tap_stride, Index depth, Index k_stride, Index n,
                                 Index n_stride, int threads, Index most = 4) {
  constexpr Index kSquare = 16;
  Index all = vectors_of(n);
  std::vector<float> result(taps * depth * all * kW);
  int chunks = chunks_for(depth, taps * depth * n, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(depth, chunk, chunks);
    for (Index j = 0; j < all; j += group_of(j, all, most)) {
      Index width = group_of(j, all, most) * kW, used = n - j * kW < width ? n - j * kW : width;
      for (Index tap = 0; tap < taps; ++tap) {
        float *to = result.data() + j * kW * taps * depth + tap * depth * width;
        const E *from = data + tap * tap_stride + j * kW * n_stride;
        for (Index k0 = range.begin; k0 < range.end; k0 += kSquare)
          for (Index i = 0; i < used; ++i)
            for (Index k = k0; k < range.end && k < k0 + kSquare; ++k)
              to[k * width + i] = value(from[k * k_stride + i * n_stride]);
      }
    }
  });
  return result;
}

// How images are cut into units of a few lines. For a 1×1 window lines mean nothing: all rows are one line.
struct Units {
  Index images, height, width, border, lines, per_image;
  Index wide; // pixels of a line in the scratch, where there is a border: an even number
  Units(const Grid &grid, Index channels)
      : images(grid.images), height(grid.height), width(grid.width), border(grid.window / 2), wide((width + 3) / 2 * 2) {
    constexpr Index kScratch = 192 << 10; // bytes that stay in the second-level cache beside the weights
    if (!border) {
      Index rows = images * height * width, wanted = kScratch / 4 / channels / 24 * 24;
      images = 1, height = rows, width = 1;
      cut(wanted < 24 ? 24 : wanted > 240 ? 240 : wanted);
    } else {
      cut(kScratch / 4 / channels / (width + 2) - 2);
    }
  }
  // Into units of so many lines, as far as there are any.
  void cut(Index wanted) {
    lines = wanted < 1 ? 1 : wanted > height ? height : wanted;
    per_image = (height + lines - 1) / lines;
  }
  Index count() const { return images * per_image; }
};

struct Unit {
  Index image, first, lines, row, rows; // its image, first line, lines; its first row of the matrix, and its rows
  Unit(const Units &units, Index i) : image(i / units.per_image), first(i % units.per_image * units.lines) {
    lines = units.height - first < units.lines ? units.height - first : units.lines;
    row = (image * units.height + first) * units.width;
    rows = lines * units.width;
  }
};

// The lines of a unit and the border around them, an even number of lines, `stride` values from pixel to pixel;
// fill(from row, pixels, to).
template <class Fill>
void with_border(const Units &units, const Unit &unit, Index stride, float *to, const Fill &fill) {
  if (!units.border)
    return fill(unit.row, unit.rows, to);
  Index line = units.wide * stride, behind = (units.width + 1) * stride;
  for (Index y = unit.first - 1; y <= unit.first + unit.lines + unit.lines % 2; ++y, to += line) {
    if (y < 0 || y >= units.height) {
      std::memset(to, 0, line * sizeof(float));
      continue;
    }
    std::memset(to, 0, stride * sizeof(float));
    fill((unit.image * units.height + y) * units.width, units.width, to + stride);
    std::memset(to + behind, 0, (line - behind) * sizeof(float));
  }
}

inline Index scratch_size(const Units &units, Index stride) {
  return (units.border ? (units.lines + 3) * units.wide : units.lines * units.width) * stride;
}

inline void zeros_behind(float *to, Index rows, Index channels, Index stride) {
  for (Index r = 0; channels < stride && r < rows; ++r)
    std::memset(to + r * stride + channels, 0, (stride - channels) * sizeof(float));
}

template <class E> struct CopyBody {
  const E *x;
  Index ldx, rows, ldo;
  float *out;
  template <int W> void run(Index c) const {
    for (Index r = 0; r < rows; ++r)
      store<W>(out + r * ldo + c, load<W>(x + r * ldx + c));
  }
};

// Rows in single precision, `stride` values apart, zeros behind the channels.
template <class E> void copy_rows(Matrix<E> x, Index rows, Index channels, Index stride, float *to) {
  for_channels<kW>(0, channels, CopyBody<E>{x.data, x.ld, rows, stride, to});
  zeros_behind(to, rows, channels, stride);
}

// The rectified prefix of a unit, `stride` values from pixel to pixel, zeros behind its channels.
template <class E>
void fill_prefix(const Units &units, const Unit &unit, Matrix<E> x, Index channels, const float *scale,
                 const float *shift, Index stride, float *to) {
  with_border(units, unit, stride, to, [&](Index row, Index pixels, float *out) {
    for (Index r = 0; r < pixels; r += kTile) {
      Index n = pixels - r < kTile ? pixels - r : kTile;
      for_channels<kW>(0, channels,
                       PrologueBody<E, float>{x.data + (row + r) * x.ld, x.ld, n, stride, scale, shift, out + r * stride});
    }
    zeros_behind(out, pixels, channels, stride);
  });
}

// Calls work(first pixel in the scratch, first row of the matrix, rows) for tiles of at most `most` rows of a unit.
template <class Work> void for_tiles(const Units &units, const Unit &unit, Index most, const Work &work) {
  Index lines = units.border ? unit.lines : 1, width = units.border ? units.width : unit.rows;
  Index tiles = (width + most - 1) / most; // of nearly one size
  for (Index y = 0; y < lines; ++y)
    for (Index i = 0; i < tiles; ++i) {
      Index from = width * i / tiles, to = width * (i + 1) / tiles;
      Index pixel = units.border ? (y + 1) * units.wide + from + 1 : from;
      work(pixel, unit.row + y * width + from, static_cast<int>(to - from));
    }
}

// Fetch the rows that the next unit has where this one has these: they arrive while this one is computed.
template <bool kToWrite = false, class E>
inline void fetch_ahead(const Units &units, const Unit &unit, Matrix<E> x, Index channels, Index row, Index rows) {
  Index last = units.images * units.height * units.width;
  for (Index r = row + unit.rows; r < row + unit.rows + rows && r < last; ++r)
    for (Index c = 0; c < channels; c += 64 / sizeof(E))
      __builtin_prefetch(x.data + r * x.ld + c, kToWrite, 2);
}

// Fetch a share of what a unit that begins at `row` reads: its lines, and one above and below them.
template <class E>
inline void fetch_share(const Units &units, Index row, Matrix<E> x, Index channels, Index share, Index shares) {
  Index begin = row - units.width, end = row + (units.lines + 1) * units.width;
  Index last = units.images * units.height * units.width;
  begin = begin < 0 ? 0 : begin, end = end > last ? last : end;
  for (Index r = begin + (end - begin) * share / shares; r < begin + (end - begin) * (share + 1) / shares; ++r)
    for (Index c = 0; c < channels; c += 64 / sizeof(E))
      __builtin_prefetch(x.data + r * x.ld + c, 0, 2);
}

template <class E> struct FiniteBody {
  const E *x;
  Index ldx, rows;
  int &good;
  template <int W> void run(Index c) const {
    vector<float, W> rest{}; // zero, unless something is not finite
    for (Index r = 0; r < rows; ++r) {
      auto v = load<W>(x + r * ldx + c);
      rest += v - v;
    }
    for (int i = 0; i < W; ++i)
      if (rest[i] != 0)
        good = 0;
  }
};

// Whether no value is infinite or undefined.
template <class E> bool is_finite(Matrix<E> x, Index rows, Index channels, int threads) {
  int chunks = chunks_for(rows, rows * channels, threads);
  std::vector<int> good(chunks, 1);
  for_chunks(chunks, [&](int chunk) {
    Range range(rows, chunk, chunks);
    FiniteBody<E> body{x.data + range.begin * x.ld, x.ld, range.size(), good[chunk]};
    for_channels<kW>(0, channels, body);
  });
  for (int one : good)
    if (!one)
      return false;
  return true;
}

// The distance in pixels of a tap of the window from its centre.
inline Index tap_offset(const Units &units, Index tap) {
  return units.border ? (tap / 3 - 1) * units.wide + tap % 3 - 1 : 0;
}

// ---- forward ----------------------------------------------------------------------------------------------------

template <class E> struct ForwardTile {
  const Units &units;
  const float *a; // the first pixel of the tile in the scratch
  Index lda, depth, taps;
  const float *b;
  E *out;
  Index ldo, channels; // that are left from here
  template <int MR, int NV> void run() const {
    Vector acc[MR][NV] = {};
    for (Index tap = 0; tap < taps; ++tap)
      add_rows<MR, NV>(a + tap_offset(units, tap) * lda, lda, b + tap * depth * NV * kW, depth, acc);
    UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int j = 0; j < NV; ++j) {
      if ((j + 1) * kW <= channels)
        store<kW>(out + r * ldo + j * kW, acc[r][j]);
      else
        for (Index c = 0; j * kW + c < channels; ++c)
          set(out[r * ldo + j * kW + c], acc[r][j][c]);
    }
  }
};

// As `convolve`.
template <class E>
void direct_convolve(Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale, const float *shift,
                     Matrix<E> out, double *moments, int threads) {
  Units units(grid, weight.in);
  Index stride = vectors_of(weight.in) * kW, all = vectors_of(weight.out), count = units.count();
  std::vector<float> b = packed(weight.data, weight.taps, weight.tap_stride, weight.in, weight.in_stride, weight.out,
                                weight.out_stride, threads);
  int chunks = static_cast<int>(count < threads ? count : threads);
  std::vector<Moments<float>> parts(chunks, Moments<float>(moments ? weight.out : 0));
  for_chunks(chunks, [&](int chunk) {
    std::vector<float> scratch(scratch_size(units, stride));
    Range range(count, chunk, chunks);
    for (Index i = range.begin; i < range.end; ++i) {
      Unit unit(units, i);
      fill_prefix(units, unit, x, weight.in, scale, shift, stride, scratch.data());
      for (Index j = 0; j < all; j += group_of(j, all)) {
        int vectors = group_of(j, all);
        for_tiles(units, unit, tile_rows(vectors), [&](Index pixel, Index row, int rows) {
          if (!j) {
            fetch_ahead(units, unit, x, weight.in, row, rows);
            fetch_ahead<true>(units, unit, out, weight.out, row, rows);
          }
          with_tile(rows, vectors,
                    ForwardTile<E>{units, scratch.data() + pixel * stride, stride, weight.in, weight.taps,
                                b.data() + j * kW * weight.taps * weight.in, out.data + row * out.ld + j * kW, out.ld,
                                weight.out - j * kW});
        });
      }
      if (moments)
        parts[chunk].template add<E>({out.data + unit.row * out.ld, out.ld}, unit.rows, weight.out, {nullptr, 0});
    }
  });
  if (moments)
    merge_moments(parts, 0, moments);
}

// ---- backward ---------------------------------------------------------------------------------------------------

// Lets `body` take in the rows of `g`, which have no gaps, and adds its sums to totals in double precision.
template <class E, bool kAdd>
void accumulate_tile(AccumulateBody<E, kAdd, float> body, const float *g, Index rows, Index channels, double *first,
                     double *second) {
  for (Index r = 0; r < rows; r += kRowsPerSum) {
    float sums[2][4 * kW] = {};
    AccumulateBody<E, kAdd, float> here = body;
    here.g = g + r * body.ldgrad, here.x += r * body.ldx, here.grad_x += r * body.ldg;
    here.rows = rows - r < kRowsPerSum ? rows - r : kRowsPerSum, here.first = sums[0], here.second = sums[1];
    for_channels<kW>(0, channels, here);
    for (Index c = 0; c < channels; ++c)
      first[c] += sums[0][c], second[c] += sums[1][c];
  }
}

template <class E, bool kAdd> struct BackwardTile {
  const Units &units;
  const float *a;
  Index lda, depth, taps;
  const float *b;
  AccumulateBody<E, kAdd, float> body; // for the channels from here on
  Index channels;
  double *first, *second;
  template <int MR, int NV> void run() const {
    Vector acc[MR][NV] = {};
    for (Index r = 0; r < MR; ++r) // they are needed when the sum is there
      for (Index c = 0; c < NV * kW && c < channels; c += 64 / sizeof(E)) {
        __builtin_prefetch(body.grad_x + r * body.ldg + c, 1);
        __builtin_prefetch(body.x + r * body.ldx + c);
      }
    for (Index tap = 0; tap < taps; ++tap)
      add_rows<MR, NV>(a + tap_offset(units, tap) * lda, lda, b + tap * depth * NV * kW, depth, acc);
    float g[MR * NV * kW];
    UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int j = 0; j < NV; ++j)
        store<kW>(g + (r * NV + j) * kW, acc[r][j]);
    AccumulateBody<E, kAdd, float> here = body;
    here.ldgrad = NV * kW;
    accumulate_tile(here, g, MR, channels < NV * kW ? channels : NV * kW, first, second);
  }
};

// Rows of values in a scratch, in lines: `stride` from row to row, `line` from line to line.
struct Lines {
  const float *data;
  Index stride, line;
};
inline Lines as_lines(const float *data, Index stride) { return {data, stride, 0}; }
inline Lines as_lines(const bf16 *, Index) { return {}; }

// into (outputs, stride) += Σ over the rows of all lines of a ⊗ b, for some of the outputs and of the channels.
struct WeightTile {
  Lines a, b;
  Index lines, rows;
  float *into;
  Index stride;
  template <int MR, int NV> void run() const {
    Vector acc[MR][NV] = {};
    for (Index y = 0; y < lines; ++y)
      add_columns<MR, NV>(a.data + y * a.line, a.stride, b.data + y * b.line, b.stride, rows, acc);
    UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int j = 0; j < NV; ++j) {
      float *to = into + r * stride + j * kW;
      store<kW>(to, load<kW>(to) + acc[r][j]);
    }
  }
};

// Calls work(first output, outputs, first vector, vectors) for tiles of at most eight outputs, of nearly one size.
template <class Work> void for_weight_tiles(Index outputs, Index all, const Work &work) {
  Index tiles = (outputs + 7) / 8;
  for (Index i = 0; i < tiles; ++i) {
    Index from = outputs * i / tiles, rows = outputs * (i + 1) / tiles - from, most = rows <= 6 ? 4 : 3;
    for (Index j = 0; j < all; j += most)
      work(from, static_cast<int>(rows), j, static_cast<int>(all - j < most ? all - j : most));
  }
}

inline void add_weight_gradient(const Units &units, const Unit &unit, Index outputs, Index taps, Lines grad,
                                const float *prefix, Index stride, float *into) {
  Index lines = units.border ? unit.lines : 1, rows = units.border ? units.width : unit.rows;
  for (Index tap = 0; tap < taps; ++tap) {
    const float *first = prefix + (units.border ? units.wide + 1 + tap_offset(units, tap) : 0) * stride;
    for_weight_tiles(outputs, stride / kW, [&](Index from, int n, Index j, int vectors) {
      with_tile(n, vectors,
                WeightTile{{grad.data + from, grad.stride, grad.line},
                           {first + j * kW, stride, units.wide * stride},
                           lines,
                           rows,
                           into + (tap * outputs + from) * stride + j * kW,
                           stride});
    });
  }
}

// As `convolve_backward`; only the gradient of the weight where `grad_x` is null.
template <class E, bool kAdd>
void direct_backward(Matrix<E> grad, Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale,
                     const float *shift, const float *mean, Matrix<E> grad_x, E *grad_weight, double *sums,
                     int threads) {
  Units units(grid, weight.in);
  Index stride = vectors_of(weight.in) * kW, all = vectors_of(weight.in), count = units.count();
  Index weights = weight.taps * weight.out * stride;
  std::vector<float> b = packed(weight.data + (weight.taps - 1) * weight.tap_stride, weight.taps, -weight.tap_stride,
                                weight.out, weight.out_stride, weight.in, weight.in_stride, threads); // turned round
  int chunks = static_cast<int>(count < threads ? count : threads);
  std::vector<Sums<float>> parts(chunks, Sums<float>(weight.in));
  std::vector<std::vector<float>> weight_parts(chunks);
  bool copies = units.border || sizeof(E) != sizeof(float); // else the gradient is used where it lies
  for_chunks(chunks, [&](int chunk) {
    std::vector<float> prefix(grad_weight ? scratch_size(units, stride) : 0);
    std::vector<float> bordered(copies ? scratch_size(units, weight.out) : 0);
    if (grad_weight)
      weight_parts[chunk].assign(weights, 0);
    Sums<float> &part = parts[chunk];
    Range range(count, chunk, chunks);
    for (Index i = range.begin; i < range.end; ++i) {
      Unit unit(units, i);
      Lines a{bordered.data(), weight.out, units.wide * weight.out};
      if (copies)
        with_border(units, unit, weight.out, bordered.data(), [&](Index row, Index pixels, float *to) {
          copy_rows(Matrix<E>{grad.data + row * grad.ld, grad.ld}, pixels, weight.out, weight.out, to);
        });
      else
        a = as_lines(grad.data + unit.row * grad.ld, grad.ld);
      if (grad_weight) {
        fill_prefix(units, unit, x, weight.in, scale, shift, stride, prefix.data());
        Lines inner = a;
        if (units.border)
          inner.data += (units.wide + 1) * weight.out;
        add_weight_gradient(units, unit, weight.out, weight.taps, inner, prefix.data(), stride,
                            weight_parts[chunk].data());
      }
      for (Index j = 0; grad_x.data && j < all; j += group_of(j, all)) {
        int vectors = group_of(j, all);
        Index c = j * kW;
        for_tiles(units, unit, tile_rows(vectors), [&](Index pixel, Index row, int rows) {
          if (!j) {
            fetch_ahead(units, unit, x, weight.in, row, rows);
            fetch_ahead(units, unit, grad, weight.out, row, rows);
          }
          AccumulateBody<E, kAdd, float> body{nullptr,
                                              0,
                                              x.data + row * x.ld + c,
                                              x.ld,
                                              grad_x.data + row * grad_x.ld + c,
                                              grad_x.ld,
                                              0,
                                              scale + c,
                                              shift + c,
                                              mean + c,
                                              nullptr,
                                              nullptr};
          with_tile(rows, vectors,
                    BackwardTile<E, kAdd>{units, a.data + pixel * a.stride, a.stride, weight.out, weight.taps,
                                          b.data() + c * weight.taps * weight.out, body, weight.in - c,
                                          part.totals.data() + c, part.totals.data() + weight.in + c});
        });
      }
    }
  });
  if (grad_x.data)
    add_up(parts, sums);
  if (!grad_weight)
    return;
  for (Index i = 0; i < weight.out; ++i) // in the memory format of the weight
    for (Index tap = 0; tap < weight.taps; ++tap)
      for (Index c = 0; c < weight.in; ++c) {
        float sum = 0;
        for (const auto &one : weight_parts)
          sum += one[(tap * weight.out + i) * stride + c];
        set(grad_weight[i * weight.out_stride + c * weight.in_stride + tap * weight.tap_stride], sum);
      }
}
