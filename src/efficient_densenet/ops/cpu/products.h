// Matrix products whose operands are made and used in the cache, included beside `loops.h`: what `pointwise.h`,
// `winograd.h` and `windowed.h` have in common. Tiles of a result stay in registers: a few rows times a few vectors.

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

constexpr int kW = kVectorBytes / 4; // values of a vector
using Vector = vector<float, kW>;
using Words = vector<std::int32_t, kW>;

// Operands consist of elements: single values, or where `pairs.h` is there also pairs of bfloat16.
template <class T> struct ScalarOf {
  using type = T;
};
template <bool kRectify, class E, class T> // in `pairs.h`
void pair_rows(Matrix<E> x, Index rows, Index channels, const float *scale, const float *shift, Index stride, T *out);
#if PAIRS
#include "pairs.h"
template <class E> using Operand = std::conditional_t<std::is_same<E, bf16>::value, pair, float>;
#else
template <class E> using Operand = float;
#endif
template <class T> using Scalar = typename ScalarOf<T>::type;
template <class T> constexpr Index kScalars = sizeof(T) / sizeof(Scalar<T>);
template <class T> inline Index elements(Index scalars) { return (scalars + kScalars<T> - 1) / kScalars<T>; }
template <class T> inline Scalar<T> *scalars(T *p) { return reinterpret_cast<Scalar<T> *>(p); }

inline float value(const float &x) { return x; }
inline float value(const bf16 &x) { return load<1>(&x)[0]; }
template <class E> inline void set(E &x, float value) { store<1>(&x, vector<float, 1>{value}); }
template <class S, class E> inline void assign(S &to, const E &from) {
  if constexpr (std::is_same<S, E>::value)
    to = from;
  else
    set(to, value(from));
}

// Values of a scratch, which begins where a line of the cache does. They are undefined, for most are written first.
template <class T> class Buffer {
  T *values;

public:
  explicit Buffer(Index n) : values(static_cast<T *>(std::aligned_alloc(64, (n * sizeof(T) + 64) / 64 * 64))) {
    if (!values)
      std::abort();
  }
  Buffer(Buffer &&other) : values(other.values) { other.values = nullptr; }
  Buffer(const Buffer &) = delete;
  ~Buffer() { std::free(values); }
  T *data() const { return values; }
};

inline Index vectors_of(Index channels) { return (channels + kW - 1) / kW; }

inline Vector load_elements(const float *p) { return load<kW>(p); }
inline Vector multiply_add(float s, Vector v, Vector sum) { return sum + s * v; }

// acc[r][j] += Σ_k a[r·lda + k] · b[k][j]: rows of `a` against a packed block of NV vectors.
template <int MR, int NV, class T>
inline __attribute__((always_inline)) void add_rows(const T *a, Index lda, const T *b, Index n, Vector (&acc)[MR][NV]) {
  for (Index k = 0; k < n; ++k) {
    decltype(load_elements(b)) v[NV];
    UNROLL for (int j = 0; j < NV; ++j) v[j] = load_elements(b + (k * NV + j) * kW);
    UNROLL for (int r = 0; r < MR; ++r) {
      T s = a[r * lda + k];
      UNROLL for (int j = 0; j < NV; ++j) acc[r][j] = multiply_add(s, v[j], acc[r][j]);
    }
  }
}

// acc[r][j] += Σ_p a[p·lda + r] · b[p·ldb + j]: columns of `a` against columns of `b`.
template <int MR, int NV, class T>
inline __attribute__((always_inline)) void add_columns(const T *a, Index lda, const T *b, Index ldb, Index n,
                                                       Vector (&acc)[MR][NV]) {
  for (Index p = 0; p < n; ++p) {
    decltype(load_elements(b)) v[NV];
    UNROLL for (int j = 0; j < NV; ++j) v[j] = load_elements(b + p * ldb + j * kW);
    UNROLL for (int r = 0; r < MR; ++r) {
      T s = a[p * lda + r];
      UNROLL for (int j = 0; j < NV; ++j) acc[r][j] = multiply_add(s, v[j], acc[r][j]);
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

// A tile stays in registers beside the vectors of one row of `b` and a value of `a`: its largest number of vectors, and
// its largest number of rows for a number of vectors.
constexpr int kMostVectors = kRegisters == 32 ? 4 : 3;
constexpr int tile_rows(int vectors) {
  return kRegisters == 32 ? (vectors == 1 ? 14 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6)
                          : (vectors == 1 ? 12 : vectors == 2 ? 6 : 4);
}
// The most vectors of a tile with so many rows.
constexpr int tile_vectors(int rows) {
  int vectors = kMostVectors;
  while (vectors > 1 && tile_rows(vectors) < rows)
    --vectors;
  return vectors;
}

template <int NV = kMostVectors, class Body> inline void with_tile(int rows, int vectors, const Body &body) {
  if (vectors == NV)
    with_rows<tile_rows(NV), NV>(rows, body);
  else if constexpr (NV > 1)
    with_tile<NV - 1>(rows, vectors, body);
}

// Vectors in the group that begins at vector `j` of `all`: at most so many, in groups of nearly one size.
inline int group_of(Index j, Index all, Index most = kMostVectors) {
  Index left = all - j, groups = (left + most - 1) / most;
  return static_cast<int>((left + groups - 1) / groups);
}

template <class E, class S> struct CopyBody {
  const E *x;
  Index ldx, rows, ldo;
  S *out;
  template <int W> void run(Index c) const {
    for (Index r = 0; r < rows; ++r)
      store<W>(out + r * ldo + c, load<W>(x + r * ldx + c));
  }
};

// Whether the compiler knows how to exchange values of vectors.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLES 1
#else
#define SHUFFLES 0
#endif

#if SHUFFLES
template <int S, std::size_t... I> inline void exchange(Words &a, Words &b, std::index_sequence<I...>) {
  Words first = __builtin_shufflevector(a, b, (I & S ? kW + I - S : I)...);
  b = __builtin_shufflevector(a, b, (I & S ? kW + I : I + S)...);
  a = first;
}
// Transposes a square of words: squares of side S change places inside of squares twice as large.
template <int S = 1> inline __attribute__((always_inline)) void transpose(Words (&rows)[kW]) {
  UNROLL for (int i = 0; i < kW; ++i) if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_index_sequence<kW>());
  if constexpr (2 * S < kW)
    transpose<2 * S>(rows);
}
#endif

// to[k·width + i] = from[i·stride + k], elements of one word each.
template <class T> void copy_transposed(const T *from, Index stride, Index depth, Index n, Index width, T *to) {
  static_assert(sizeof(T) == 4);
  Index k = 0;
#if SHUFFLES
  for (; k + kW <= depth; k += kW)
    for (Index i = 0; i < n; i += kW) {
      Words rows[kW] = {};
      for (Index r = 0; r < kW && i + r < n; ++r)
        std::memcpy(&rows[r], from + (i + r) * stride + k, sizeof(Words));
      transpose(rows);
      for (Index r = 0; r < kW; ++r)
        std::memcpy(to + (k + r) * width + i, &rows[r], sizeof(Words));
    }
#endif
  for (; k < depth; ++k)
    for (Index i = 0; i < n; ++i)
      to[k * width + i] = from[i * stride + k];
}

// Packed for `add_rows`: [group][place][k][vectors of the group, at most `most`], zeros beyond `n`; taken from
// data[place·place_stride + k·k_stride + i·n_stride].
template <class T, class E>
Buffer<T> packed(const E *data, Index places, Index place_stride, Index depth, Index k_stride, Index n, Index n_stride,
                 int threads, Index most = kMostVectors) {
  constexpr Index kPer = kScalars<T>, kSquare = 16;
  Index all = vectors_of(n), tall = elements<T>(depth);
  Buffer<T> result(places * tall * all * kW);
  int chunks = chunks_for(tall, places * depth * n, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(tall, chunk, chunks);
    Index begin = range.begin * kPer, end = range.end * kPer < depth ? range.end * kPer : depth, whole = (end - begin) / kPer;
    for (Index j = 0; j < all; j += group_of(j, all, most)) {
      Index width = group_of(j, all, most) * kW, used = n - j * kW < width ? n - j * kW : width;
      for (Index place = 0; place < places; ++place) {
        T *to = result.data() + j * kW * places * tall + (place * tall + range.begin) * width;
        const E *from = data + place * place_stride + j * kW * n_stride + begin * k_stride;
        if (used < width || end - begin < range.size() * kPer)
          std::memset(to, 0, range.size() * width * sizeof(T));
        Index k0 = 0; // up to which a fast way has gone
        if (n_stride == 1) {
          k0 = end - begin;
          if constexpr (kPer == 1)
            for_channels<kW>(0, used, CopyBody<E, T>{from, k_stride, k0, width, to});
          else
            pair_rows<false>(Matrix<const E>{from, k_stride}, k0, used, nullptr, nullptr, width, to);
        } else if constexpr (std::is_same<E, Scalar<T>>::value) {
          if (k_stride == 1 && n_stride % kPer == 0) {
            k0 = whole * kPer;
            copy_transposed(reinterpret_cast<const T *>(from), n_stride / kPer, whole, used, width, to);
          }
        }
        // In small squares, for one side or the other is far apart in memory.
        for (; k0 < end - begin; k0 += kSquare)
          for (Index i = 0; i < used; ++i)
            for (Index k = k0; k < end - begin && k < k0 + kSquare; ++k)
              assign(scalars(to)[(k / kPer * width + i) * kPer + k % kPer], from[k * k_stride + i * n_stride]);
      }
    }
  });
  return result;
}

constexpr Index kLargestTile = 24 * kW; // values
constexpr Index kHere = 0;

// Terms of a sum that are added up one by one, before their sum goes to the sum of all terms: in single precision, this
// takes away two thirds of the rounding error of a sum of 256 terms.
constexpr Index kTermsPerSum = 32;

// out (+)= Σ over places of a[place] · b[place] for a tile: `a` has rows `lda` elements apart, and each place's begin at
// an offset; `b` is packed for its vectors.
template <class T> struct ProductTile {
  const T *a;
  Index lda, depth;
  const T *b;
  float *out;
  Index ldo;
  bool add = false;
  Index places = 1;
  const Index *offsets = &kHere;
  template <int MR, int NV> __attribute__((noinline)) void run() const {
    Vector acc[MR][NV] = {};
    bool more = add;
    Index terms = 0;
    for (Index place = 0; place < places; ++place)
      for (Index k = 0, n; k < depth; k += n) {
        n = depth - k < kTermsPerSum ? depth - k : kTermsPerSum;
        if (terms + n > kTermsPerSum) {
          add_to_out<MR, NV>(acc, more);
          UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int j = 0; j < NV; ++j) acc[r][j] = Vector{};
          more = true, terms = 0;
        }
        add_rows<MR, NV>(a + offsets[place] + k, lda, b + (place * depth + k) * NV * kW, n, acc);
        terms += n;
      }
    add_to_out<MR, NV>(acc, more);
  }
  template <int MR, int NV>
  inline __attribute__((always_inline)) void add_to_out(const Vector (&acc)[MR][NV], bool more) const {
    UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int j = 0; j < NV; ++j) {
      float *to = out + r * ldo + j * kW;
      store<kW>(to, more ? load<kW>(to) + acc[r][j] : acc[r][j]);
    }
  }
};

// Rows of elements, `ld` from row to row and `line` from line to line.
template <class T> struct Lines {
  const T *data;
  Index ld, line;
};

// into (outputs, stride) += Σ over the rows of all lines of a ⊗ b, for some of the outputs and of the channels.
template <class T> struct OuterTile {
  Lines<T> a, b;
  Index lines, rows;
  float *into;
  Index stride;
  template <int MR, int NV> __attribute__((noinline)) void run() const {
    Vector acc[MR][NV] = {};
    for (Index y = 0; y < lines; ++y)
      add_columns<MR, NV>(a.data + y * a.line, a.ld, b.data + y * b.line, b.ld, rows, acc);
    UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int j = 0; j < NV; ++j) {
      float *to = into + r * stride + j * kW;
      store<kW>(to, load<kW>(to) + acc[r][j]);
    }
  }
};

// The same for all outputs and channels, in tiles of a few outputs, of nearly one size.
template <class T>
void add_outer(Lines<T> a, Index outputs, Lines<T> b, Index channels, Index lines, Index rows, float *into,
               Index stride) {
  constexpr Index kOutputs = kRegisters / 4;
  Index tiles = (outputs + kOutputs - 1) / kOutputs, all = vectors_of(channels);
  Index most = tile_vectors((outputs + tiles - 1) / tiles);
  // A slice of `b` stays in the first-level cache for all outputs.
  for (Index j = 0; j < all; j += most)
    for (Index i = 0; i < tiles; ++i) {
      Index from = outputs * i / tiles, n = outputs * (i + 1) / tiles - from;
      with_tile(static_cast<int>(n), static_cast<int>(all - j < most ? all - j : most),
                OuterTile<T>{{a.data + from, a.ld, a.line},
                             {b.data + j * kW, b.ld, b.line},
                             lines,
                             rows,
                             into + from * stride + j * kW,
                             stride});
    }
}

template <class E> struct GatherBody {
  const std::vector<Buffer<float>> &parts;
  Index offset;
  E *out;
  template <int W> void run(Index c) const {
    vector<float, W> sum{};
    for (const auto &part : parts)
      sum += load<W>(part.data() + offset + c);
    store<W>(out + c, sum);
  }
};

// The gradient of the weight, in its memory format, from the sums (taps, out, stride) of all parts.
template <class E>
void gather_weight(const std::vector<Buffer<float>> &parts, Index stride, const Weight<E> &weight, E *grad,
                   int threads) {
  int chunks = chunks_for(weight.out, weight.taps * weight.out * weight.in, threads);
  for_chunks(chunks, [&](int chunk) {
    Range range(weight.out, chunk, chunks);
    for (Index o = range.begin; o < range.end; ++o)
      for (Index tap = 0; tap < weight.taps; ++tap) {
        Index offset = (tap * weight.out + o) * stride;
        E *to = grad + o * weight.out_stride + tap * weight.tap_stride;
        if (weight.in_stride == 1) {
          for_channels<kW>(0, weight.in, GatherBody<E>{parts, offset, to});
          continue;
        }
        E row[kW];
        for (Index c = 0; c < weight.in; c += kW) {
          Index n = weight.in - c < kW ? weight.in - c : kW;
          for_channels<kW>(0, n, GatherBody<E>{parts, offset + c, row});
          for (Index i = 0; i < n; ++i)
            to[(c + i) * weight.in_stride] = row[i];
        }
      }
  });
}

// Calls work(first row, rows) for tiles of at most `most` of them, of nearly one size.
template <class Work> void for_tiles(Index rows, Index most, const Work &work) {
  Index tiles = (rows + most - 1) / most;
  for (Index i = 0; i < tiles; ++i) {
    Index from = rows * i / tiles;
    work(from, static_cast<int>(rows * (i + 1) / tiles - from));
  }
}

template <class E> inline Matrix<E> from_row(Matrix<E> x, Index row) { return {x.data + row * x.ld, x.ld}; }

// Fetch rows that will be needed, at once or, into the second-level cache, soon.
template <bool kAtOnce = false, class E>
inline void fetch(Matrix<E> x, Index begin, Index end, Index channels) {
  for (Index r = begin; r < end; ++r)
    for (Index c = 0; c < channels; c += 64 / sizeof(E))
      __builtin_prefetch(x.data + r * x.ld + c, 0, kAtOnce ? 3 : 2);
  __asm__ volatile(""); // or GCC takes this for a function without an effect, and leaves out the calls
}

template <class S> void zeros_behind(S *to, Index rows, Index channels, Index stride) {
  for (Index r = 0; channels < stride && r < rows; ++r)
    std::memset(to + r * stride + channels, 0, (stride - channels) * sizeof(S));
}

// relu(scale·x + shift) of some rows, `stride` elements apart, zeros behind the channels.
template <class E, class T>
void fill_prefix(Matrix<E> x, Index rows, Index channels, const float *scale, const float *shift, Index stride, T *to) {
  Index ldo = stride * kScalars<T>;
  for (Index r = 0; r < rows; r += kTile)
    for_channels<kW>(0, channels, PrologueBody<E, Scalar<T>>{x.data + r * x.ld, x.ld, rows - r < kTile ? rows - r : kTile,
                                                             ldo, scale, shift, scalars(to + r * stride)});
  zeros_behind(scalars(to), rows, channels, ldo);
}

// The same without the rectified affine map.
template <class E, class T> void fill_copy(Matrix<E> x, Index rows, Index channels, Index stride, T *to) {
  Index ldo = stride * kScalars<T>;
  for_channels<kW>(0, channels, CopyBody<E, Scalar<T>>{x.data, x.ld, rows, ldo, scalars(to)});
  zeros_behind(scalars(to), rows, channels, ldo);
}

template <bool kAdd, class E>
AccumulateBody<E, kAdd, float> accumulation(Matrix<E> x, Matrix<E> grad_x, Index ldgrad, const float *scale,
                                            const float *shift, const float *mean) {
  return {nullptr, ldgrad, x.data, x.ld, grad_x.data, grad_x.ld, 0, scale, shift, mean, nullptr, nullptr};
}

// Lets `body` take in the rows of `g`, `body.ldgrad` apart, and adds its sums to totals in double precision.
template <bool kAdd, class E>
__attribute__((noinline)) void accumulate_rows_of(const float *g, AccumulateBody<E, kAdd, float> body, Index rows,
                                                  Index channels, double *first, double *second) {
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
