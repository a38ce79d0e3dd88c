// 3×3 convolutions with 16 multiplications in place of 36 for every 2×2 pixels, included beside `products.h`.
//
// Winograd's minimal filtering F(2×2, 3×3) (Lavin, Gray: Fast Algorithms for Convolutional Neural Networks, 2016). For
// a 2×2 tile y of the result, the 4×4 pixels d around it and the window g,
//
//   y = Aᵀ[(G g Gᵀ) ∘ (Bᵀ d B)]A,   Bᵀ = 1  0 -1  0   G =  1   0   0   Aᵀ = 1  1  1  0
//                                        0  1  1  0       ½   ½   ½        0  1 -1 -1
//                                        0 -1  1  0       ½  -½   ½
//                                        0  1  0 -1       0   0   1
//
// and summed over channels each of the 16 positions is a matrix product over all tiles. The gradient of the prefix is the
// same with the window turned round. That of the window is the transpose: Gᵀ[Σ (A ∂y Aᵀ) ∘ (Bᵀ d B)]G. The factors ±1
// and ½ keep the error of a sum in the size of the direct one's (tests compare both with double precision).
//
// An infinite or undefined value would spread over its tile: where one turns up, the caller takes the direct way.

constexpr Index kPositions = 16;

// Tiles of a unit: two lines of it for each line of tiles; beyond the edges of the image they see zeros.
inline Index tiles_across(const Units &units) { return (units.width + 1) / 2; }
inline Index tiles_of(const Units &units, Index lines) { return (lines + 1) / 2 * tiles_across(units); }

// Values of a scratch: position by position, tile by tile, `stride` values for each.
struct Positions {
  Index stride, distance; // from tile to tile, from position to position
  // Positions that lie a multiple of 4096 bytes apart would fight for the same lines of the cache.
  Positions(Index tiles, Index channels) : stride(vectors_of(channels) * kW), distance(tiles * stride + kW) {}
  Index size() const { return kPositions * distance; }
};

// Lines of a unit, and channels of the prefix that are transformed at a time, so that both stay in the cache.
inline Units winograd_units(const Grid &grid) {
  Units units(grid, 1);
  Index across = tiles_across(units), rows = 32 / across;
  units.cut(2 * (rows < 1 ? 1 : rows));
  return units;
}
inline Index channels_at_a_time(const Units &units, Index channels) {
  Index most = 3072 / tiles_of(units, units.lines);
  most = most < kW ? kW : most > 96 ? 96 : most;
  Index blocks = (channels + most - 1) / most;
  return vectors_of((channels + blocks - 1) / blocks) * kW;
}

// to = Bᵀ d B for the tiles of a unit, which lies with its border in a scratch, `stride` values from pixel to pixel.
inline void transform_input(const Units &units, const Unit &unit, const float *from, Index stride, float *to,
                            Positions at) {
  Index across = tiles_across(units), line = units.wide * stride;
  for (Index y = 0; y < unit.lines; y += 2, from += 2 * line, to += across * at.stride)
    for (Index c = 0; c < stride; c += kW) {
      Vector d[4][4]; // four columns, transformed vertically
      auto column = [&](Index pixel, Vector(&to)[4]) {
        const float *p = from + pixel * stride + c;
        Vector v0 = load<kW>(p), v1 = load<kW>(p + line), v2 = load<kW>(p + 2 * line), v3 = load<kW>(p + 3 * line);
        to[0] = v0 - v2, to[1] = v1 + v2, to[2] = v2 - v1, to[3] = v1 - v3;
      };
      column(0, d[0]);
      column(1, d[1]);
      for (Index t = 0; t < across; ++t) {
        column(2 * t + 2, d[2]);
        column(2 * t + 3, d[3]);
        float *p = to + t * at.stride + c;
        UNROLL for (int i = 0; i < 4; ++i, p += 4 * at.distance) {
          store<kW>(p, d[0][i] - d[2][i]);
          store<kW>(p + at.distance, d[1][i] + d[2][i]);
          store<kW>(p + 2 * at.distance, d[2][i] - d[1][i]);
          store<kW>(p + 3 * at.distance, d[1][i] - d[3][i]);
          d[0][i] = d[2][i], d[1][i] = d[3][i];
        }
      }
    }
}

// to = A ∂y Aᵀ for the tiles of a unit; as above.
inline void transform_gradient(const Units &units, const Unit &unit, const float *from, Index stride, float *to,
                               Positions at) {
  Index across = tiles_across(units), line = units.wide * stride;
  from += line + stride; // the first pixel inside of the border
  for (Index y = 0; y < unit.lines; y += 2, from += 2 * line, to += across * at.stride)
    for (Index c = 0; c < stride; c += kW)
      for (Index t = 0; t < across; ++t) {
        Vector rows[4][2];
        UNROLL for (int j = 0; j < 2; ++j) {
          const float *q = from + (2 * t + j) * stride + c;
          Vector upper = load<kW>(q), lower = load<kW>(q + line);
          rows[0][j] = upper, rows[1][j] = upper + lower, rows[2][j] = upper - lower, rows[3][j] = -lower;
        }
        float *p = to + t * at.stride + c;
        UNROLL for (int i = 0; i < 4; ++i, p += 4 * at.distance) {
          store<kW>(p, rows[i][0]);
          store<kW>(p + at.distance, rows[i][0] + rows[i][1]);
          store<kW>(p + 2 * at.distance, rows[i][0] - rows[i][1]);
          store<kW>(p + 3 * at.distance, -rows[i][1]);
        }
      }
}

// Calls work(first pixel's row in the unit, whether there is a column to its right, whether a line below) for each tile.
template <class Work> inline void for_each_tile(const Units &units, const Unit &unit, const Work &work) {
  for (Index y = 0; y < unit.lines; y += 2)
    for (Index x = 0; x < units.width; x += 2)
      work(y * units.width + x, x + 1 < units.width, y + 1 < unit.lines);
}

// out = Aᵀ m A for the tiles of a unit; `finite` is left as it is if all of it is.
template <class E> struct OutputTransform {
  const Units &units;
  const Unit &unit;
  const float *from;
  Positions at;
  E *out; // the unit's first row
  Index ldo;
  bool &finite;
  template <int W> void run(Index c) const {
    using V = vector<float, W>;
    const float *p = from + c;
    V other{}; // zero, unless something is not finite
    for_each_tile(units, unit, [&](Index row, bool right, bool below) {
      V m[2][4];
      UNROLL for (int j = 0; j < 4; ++j) {
        V v[4];
        UNROLL for (int i = 0; i < 4; ++i) v[i] = load<W>(p + (4 * i + j) * at.distance);
        m[0][j] = v[0] + v[1] + v[2];
        m[1][j] = v[1] - v[2] - v[3];
      }
      E *to = out + row * ldo + c;
      UNROLL for (int i = 0; i < 2; ++i) {
        V left = m[i][0] + m[i][1] + m[i][2], next = m[i][1] - m[i][2] - m[i][3];
        other += (left - left) + (next - next);
        if (i && !below)
          break;
        store<W>(to + i * units.width * ldo, left);
        if (right)
          store<W>(to + (i * units.width + 1) * ldo, next);
      }
      p += at.stride;
    });
    for (int i = 0; i < W; ++i)
      if (other[i] != 0)
        finite = false;
  }
};

// G g Gᵀ of every window, (positions, out, in); the windows turned round where `turned`.
template <class E> std::vector<float> transformed(const Weight<E> &weight, bool turned, int threads) {
  std::vector<float> result(kPositions * weight.out * weight.in);
  Index plane = weight.out * weight.in, first = turned ? 8 * weight.tap_stride : 0;
  Index tap = turned ? -weight.tap_stride : weight.tap_stride;
  int chunks = chunks_for(weight.out, kPositions * plane, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(weight.out, chunk, chunks);
    for (Index o = range.begin; o < range.end; ++o)
      for (Index c = 0; c < weight.in; ++c) {
        const E *g = weight.data + o * weight.out_stride + c * weight.in_stride + first;
        float rows[4][3];
        for (Index j = 0; j < 3; ++j) {
          float g0 = value(g[j * tap]), g1 = value(g[(3 + j) * tap]), g2 = value(g[(6 + j) * tap]);
          rows[0][j] = g0, rows[1][j] = (g0 + g1 + g2) / 2, rows[2][j] = (g0 - g1 + g2) / 2, rows[3][j] = g2;
        }
        float *to = result.data() + o * weight.in + c;
        for (Index i = 0; i < 4; ++i, to += 4 * plane) {
          float g0 = rows[i][0], g1 = rows[i][1], g2 = rows[i][2];
          to[0] = g0, to[plane] = (g0 + g1 + g2) / 2, to[2 * plane] = (g0 - g1 + g2) / 2, to[3 * plane] = g2;
        }
      }
  });
  return result;
}

// The gradient Gᵀ u G of each window from the sums u, `at`, of all parts.
template <class E>
void gather_windows(const std::vector<std::vector<float>> &parts, Positions at, const Weight<E> &weight, E *grad,
                    int threads) {
  int chunks = chunks_for(weight.out, kPositions * weight.out * weight.in, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(weight.out, chunk, chunks);
    for (Index o = range.begin; o < range.end; ++o)
      for (Index c = 0; c < weight.in; ++c) {
        float columns[3][4];
        for (Index j = 0; j < 4; ++j) {
          float u[4] = {};
          for (Index i = 0; i < 4; ++i)
            for (const auto &part : parts)
              u[i] += part[(4 * i + j) * at.distance + o * at.stride + c];
          float half = (u[1] + u[2]) / 2;
          columns[0][j] = u[0] + half, columns[1][j] = (u[1] - u[2]) / 2, columns[2][j] = half + u[3];
        }
        E *to = grad + o * weight.out_stride + c * weight.in_stride;
        for (Index i = 0; i < 3; ++i) {
          const float *u = columns[i];
          float half = (u[1] + u[2]) / 2, row[3] = {u[0] + half, (u[1] - u[2]) / 2, half + u[3]};
          for (Index j = 0; j < 3; ++j)
            set(to[(3 * i + j) * weight.tap_stride], row[j]);
        }
      }
  });
}

struct PositionTile {
  const float *a;
  Index lda, depth;
  const float *b;
  float *out;
  Index ldo;
  bool add;
  template <int MR, int NV> void run() const {
    Vector acc[MR][NV] = {};
    if (add)
      UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int j = 0; j < NV; ++j)
          acc[r][j] = load<kW>(out + r * ldo + j * kW);
    add_rows<MR, NV>(a, lda, b, depth, acc);
    UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int j = 0; j < NV; ++j)
        store<kW>(out + r * ldo + j * kW, acc[r][j]);
  }
};

// One group of columns of all 16 products: to[position] (+)= from[position] · b[position], where `b` is packed for all
// `taller` rows and here are `depth` of them from row `first` on. Calls between(i, n) after the i-th of n tiles.
template <class Between>
void multiply_positions(const float *from, Positions at, Index tiles, Index first, Index depth, const float *b,
                        Index taller, int vectors, float *to, Positions to_at, bool add, const Between &between) {
  Index width = vectors * kW, most = tile_rows(vectors), blocks = (tiles + most - 1) / most; // of nearly one size
  for (Index position = 0; position < kPositions; ++position) {
    for (Index i = 0; i < blocks; ++i) {
      Index t = tiles * i / blocks, rows = tiles * (i + 1) / blocks - t;
      with_tile(static_cast<int>(rows), vectors,
                PositionTile{from + position * at.distance + t * at.stride, at.stride, depth,
                             b + (position * taller + first) * width,
                             to + position * to_at.distance + t * to_at.stride, to_at.stride, add});
      between(position * blocks + i, kPositions * blocks);
    }
  }
}

// Whether the tiles cover the image well enough to gain anything.
inline bool suits_winograd(const Grid &grid) {
  Index tiles = ((grid.width + 1) / 2) * ((grid.height + 1) / 2);
  return grid.window == 3 && tiles * 20 < grid.width * grid.height * 9;
}

// Fetch a share of the next `step` channels, from the `c`th on, or of the next unit's first if there are none.
template <class E>
void fetch_next(const Units &units, const Unit &unit, Matrix<E> x, Index channels, Index c, Index step, Index share,
                Index shares) {
  Index row = c < channels ? unit.row : unit.row + unit.rows;
  c = c < channels ? c : 0;
  fetch_share(units, row, Matrix<E>{x.data + c, x.ld}, channels - c < step ? channels - c : step, share, shares);
}

// Bᵀ d B of the rectified prefix, by way of a scratch for its lines.
template <class E>
void transform_prefix(const Units &units, const Unit &unit, Matrix<E> x, Index channels, const float *scale,
                      const float *shift, float *lines, float *to, Positions at) {
  Index stride = vectors_of(channels) * kW;
  fill_prefix(units, unit, x, channels, scale, shift, stride, lines);
  transform_input(units, unit, lines, stride, to, at);
}

// As `convolve`; false, and nothing of use is done, where a result is not finite.
template <class E>
bool winograd_convolve(Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale, const float *shift,
                       Matrix<E> out, double *moments, int threads) {
  Units units = winograd_units(grid);
  Index tiles = tiles_of(units, units.lines), step = channels_at_a_time(units, weight.in), count = units.count();
  Index all = vectors_of(weight.out);
  Positions at(tiles, step), out_at(tiles, weight.out);
  std::vector<float> windows = transformed(weight, false, threads);
  std::vector<float> b = packed(windows.data(), kPositions, weight.out * weight.in, weight.in, 1, weight.out, weight.in,
                                threads);
  int chunks = static_cast<int>(count < threads ? count : threads);
  std::vector<Moments<float>> parts(chunks, Moments<float>(moments ? weight.out : 0));
  std::vector<int> all_finite(chunks);
  for_chunks(chunks, [&](int chunk) {
    std::vector<float> lines(scratch_size(units, step)), prefix(at.size()), result(out_at.size());
    bool finite = true;
    Range range(count, chunk, chunks);
    for (Index i = range.begin; i < range.end && finite; ++i) {
      Unit unit(units, i);
      Index here = tiles_of(units, unit.lines);
      for (Index c = 0; c < weight.in; c += step) {
        Index depth = weight.in - c < step ? weight.in - c : step;
        transform_prefix(units, unit, Matrix<E>{x.data + c, x.ld}, depth, scale + c, shift + c, lines.data(),
                         prefix.data(), at);
        for (Index j = 0; j < all; j += group_of(j, all))
          multiply_positions(prefix.data(), at, here, c, depth, b.data() + j * kW * kPositions * weight.in, weight.in,
                             group_of(j, all), result.data() + j * kW, out_at, c > 0, [&](Index share, Index shares) {
                               if (!j)
                                 fetch_next(units, unit, x, weight.in, c + step, step, share, shares);
                             });
      }
      Matrix<E> to{out.data + unit.row * out.ld, out.ld};
      for_channels<kW>(0, weight.out, OutputTransform<E>{units, unit, result.data(), out_at, to.data, to.ld, finite});
      if (moments)
        parts[chunk].template add<E>(to, unit.rows, weight.out, {nullptr, 0});
    }
    all_finite[chunk] = finite;
  });
  for (int finite : all_finite)
    if (!finite)
      return false;
  if (moments)
    merge_moments(parts, 0, moments);
  return true;
}

// into += Σ over the tiles of a unit of (A ∂y Aᵀ) ∘ (Bᵀ d B), for some of the channels of d.
template <class Between>
void add_windows(const float *grad, Positions grad_at, const float *prefix, Positions at, Index tiles, Index outputs,
                 Index channels, float *into, Positions into_at, const Between &between) {
  for (Index position = 0; position < kPositions; ++position) {
    for_weight_tiles(outputs, vectors_of(channels), [&](Index from, int rows, Index j, int vectors) {
      with_tile(rows, vectors,
                WeightTile{{grad + position * grad_at.distance + from, grad_at.stride, 0},
                           {prefix + position * at.distance + j * kW, at.stride, 0},
                           1,
                           tiles,
                           into + position * into_at.distance + from * into_at.stride + j * kW,
                           into_at.stride});
    });
    between(position, kPositions);
  }
}

// As `convolve_backward`, for finite gradients and weights.
template <class E, bool kAdd>
void winograd_backward(Matrix<E> grad, Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale,
                       const float *shift, const float *mean, Matrix<E> grad_x, E *grad_weight, double *sums,
                       int threads) {
  constexpr Index kGroup = 3; // vectors of results at a time, so that they stay in the cache
  Units units = winograd_units(grid);
  Index tiles = tiles_of(units, units.lines), step = channels_at_a_time(units, weight.in), count = units.count();
  Index all = vectors_of(weight.in);
  Positions at(tiles, step), grad_at(tiles, weight.out), result_at(tiles, kGroup * kW), weight_at(weight.out, weight.in);
  std::vector<float> windows = transformed(weight, true, threads);
  std::vector<float> b = packed(windows.data(), kPositions, weight.out * weight.in, weight.out, weight.in, weight.in, 1,
                                threads, kGroup);
  int chunks = static_cast<int>(count < threads ? count : threads);
  std::vector<Sums<float>> parts(chunks, Sums<float>(weight.in));
  std::vector<std::vector<float>> weight_parts(chunks);
  for_chunks(chunks, [&](int chunk) {
    std::vector<float> lines(grad_weight ? scratch_size(units, step) : 0), prefix(grad_weight ? at.size() : 0);
    std::vector<float> grad_lines(scratch_size(units, grad_at.stride)), around(grad_at.size()), result(result_at.size());
    std::vector<float> g(units.lines * units.width * kGroup * kW);
    if (grad_weight)
      weight_parts[chunk].assign(weight_at.size(), 0);
    double *totals = parts[chunk].totals.data();
    Range range(count, chunk, chunks);
    for (Index i = range.begin; i < range.end; ++i) {
      Unit unit(units, i);
      Index here = tiles_of(units, unit.lines);
      with_border(units, unit, grad_at.stride, grad_lines.data(), [&](Index row, Index pixels, float *to) {
        copy_rows(Matrix<E>{grad.data + row * grad.ld, grad.ld}, pixels, weight.out, grad_at.stride, to);
      });
      if (grad_weight) {
        transform_gradient(units, unit, grad_lines.data(), grad_at.stride, around.data(), grad_at);
        for (Index c = 0; c < weight.in; c += step) {
          Index depth = weight.in - c < step ? weight.in - c : step;
          transform_prefix(units, unit, Matrix<E>{x.data + c, x.ld}, depth, scale + c, shift + c, lines.data(),
                           prefix.data(), at);
          add_windows(around.data(), grad_at, prefix.data(), at, here, weight.out, depth,
                      weight_parts[chunk].data() + c, weight_at, [&](Index share, Index shares) {
                        fetch_next(units, unit, x, weight.in, c + step, step, share, shares);
                      });
        }
      }
      transform_input(units, unit, grad_lines.data(), grad_at.stride, around.data(), grad_at);
      for (Index j = 0; j < all; j += group_of(j, all, kGroup)) {
        int vectors = group_of(j, all, kGroup);
        Index c = j * kW, width = vectors * kW, used = weight.in - c < width ? weight.in - c : width;
        AccumulateBody<E, kAdd, float> body{nullptr,
                                            width,
                                            x.data + unit.row * x.ld + c,
                                            x.ld,
                                            grad_x.data + unit.row * grad_x.ld + c,
                                            grad_x.ld,
                                            0,
                                            scale + c,
                                            shift + c,
                                            mean + c,
                                            nullptr,
                                            nullptr};
        multiply_positions(around.data(), grad_at, here, 0, weight.out, b.data() + c * kPositions * weight.out,
                           weight.out, vectors, result.data(), result_at, false, [&](Index share, Index shares) {
                             Range rows(unit.rows, static_cast<int>(share), static_cast<int>(shares));
                             for (Index r = rows.begin; r < rows.end; ++r)
                               for (Index k = 0; k < used; k += kW) {
                                 __builtin_prefetch(body.x + r * x.ld + k);
                                 __builtin_prefetch(body.grad_x + r * grad_x.ld + k, 1);
                               }
                           });
        bool finite = true;
        for_channels<kW>(0, used, OutputTransform<float>{units, unit, result.data(), result_at, g.data(), width, finite});
        accumulate_tile(body, g.data(), unit.rows, used, totals + c, totals + weight.in + c);
      }
    }
  });
  add_up(parts, sums);
  if (grad_weight)
    gather_windows(weight_parts, weight_at, weight, grad_weight, threads);
}

// ---- the better way for each shape ------------------------------------------------------------------------------

// out = convolution(relu(scale·x + shift)), and its mean and variance in `moments` unless that is null.
template <class E>
void convolve(Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale, const float *shift,
              Matrix<E> out, double *moments, int threads) {
  if (!suits_winograd(grid) || !winograd_convolve(x, grid, weight, scale, shift, out, moments, threads))
    direct_convolve(x, grid, weight, scale, shift, out, moments, threads);
}

template <class E, bool kAdd>
void convolve_backward(Matrix<E> grad, Matrix<E> x, const Grid &grid, const Weight<E> &weight, const float *scale,
                       const float *shift, const float *mean, Matrix<E> grad_x, E *grad_weight, double *sums,
                       int threads) {
  Index rows = grid.images * grid.height * grid.width, weights = weight.out * weight.in * weight.taps;
  if (!suits_winograd(grid) || !is_finite(grad, rows, weight.out, threads) ||
      !is_finite(Matrix<const E>{weight.data, weights}, 1, weights, threads))
    return direct_backward<E, kAdd>(grad, x, grid, weight, scale, shift, mean, grad_x, grad_weight, sums, threads);
  winograd_backward<E, kAdd>(grad, x, grid, weight, scale, shift, mean, grad_x, grad_weight, sums, threads);
  if (grad_weight && !is_finite(Matrix<E>{grad_weight, weights}, 1, weights, threads))
    direct_backward<E, kAdd>(grad, x, grid, weight, scale, shift, mean, {nullptr, 0}, grad_weight, sums, threads);
}
