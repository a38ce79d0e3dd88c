// What products are made of: elements, which are single values, or where the processor multiplies two pairs of bfloat16 at
// a time and adds both products in single precision, also such pairs: two neighbours in the direction of the sum, which
// are two channels or two rows.
#pragma once

#include "vectors.h"

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

BEGIN_LEVEL

constexpr int kW = kVectorBytes / 4; // values of a vector
using Vector = vector<float, kW>;
using Words = vector<std::int32_t, kW>;

struct pair {
  bf16 first, second;
};
template <class T> struct ScalarOf {
  using type = T;
};
template <> struct ScalarOf<pair> {
  using type = bf16;
};

// The elements of the operands of a product, for activations of type E.
template <class E> using Operand = std::conditional_t<PAIRS && std::is_same<E, bf16>::value, pair, float>;
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
inline Index whole_vectors(Index channels) { return vectors_of(channels) * kW; }

inline Vector load_elements(const float *p) { return load<kW>(p); }
inline Vector multiply_add(float s, Vector v, Vector sum) { return sum + s * v; }

END_LEVEL
