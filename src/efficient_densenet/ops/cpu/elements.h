// What products are made of: elements, which are single values, or where the processor multiplies two pairs of bfloat16 at
// a time and adds both products in single precision, also such pairs: two neighbours in the direction of the sum, which
// are two channels or two rows.
#pragma once

#include "scratch.h"
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

// Values of the scratch of the thread that asks for them; another may give them back when that thread is waiting. They
// begin where a line of the cache does, and are undefined, for most are written first.
template <class T> class Buffer {
  Scratch *scratch = nullptr;
  T *values = nullptr;

public:
  Buffer() = default;
  explicit Buffer(Index n) : scratch(&Scratch::of_thread()), values(static_cast<T *>(scratch->take(n * sizeof(T)))) {}
  Buffer(Buffer &&other) : scratch(other.scratch), values(other.values) { other.scratch = nullptr; }
  Buffer &operator=(Buffer &&other) {
    std::swap(scratch, other.scratch), std::swap(values, other.values);
    return *this;
  }
  ~Buffer() {
    if (scratch)
      scratch->give_back(values);
  }
  T *data() const { return values; }
};

inline Index vectors_of(Index channels) { return (channels + kW - 1) / kW; }
inline Index whole_vectors(Index channels) { return vectors_of(channels) * kW; }

inline Vector load_elements(const float *p) { return load<kW>(p); }
inline Vector multiply_add(float s, Vector v, Vector sum) { return sum + s * v; }

END_LEVEL
