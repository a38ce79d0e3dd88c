// The kernels against plain loops in double precision, without Python: for processors that are not at hand, such as ARM
// in an emulator, or AMX in software. Prints the worst error of each function, and returns 1 where one is too large.
// An argument is the best level to run; without one, that is the processor's.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "interface.h"

extern "C" int ed_best_instructions();
extern "C" const Kernels *ed_kernels(int level, int type);
// Of `amx_in_software.cpp`, if that is linked.
extern "C" __attribute__((weak)) long amx_products();
extern "C" __attribute__((weak)) long amx_set_up();

namespace {

struct bf16 {
  std::uint16_t bits;
};
double value(float x) { return x; }
double value(double x) { return x; }
double value(bf16 x) {
  std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
void set(float &to, double x) { to = static_cast<float>(x); }
void set(double &to, double x) { to = x; }
void set(bf16 &to, double x) { // cut off: any value will do
  float y = static_cast<float>(x);
  std::uint32_t bits;
  std::memcpy(&bits, &y, sizeof bits);
  to.bits = static_cast<std::uint16_t>(bits >> 16);
}
template <class E> using Compute = std::conditional_t<std::is_same<E, double>::value, double, float>;

std::mt19937 generator(0);
template <class E> std::vector<E> random(Index n, double low = -1, double high = 1) {
  std::uniform_real_distribution<double> uniform(low, high);
  std::vector<E> values(n);
  for (E &x : values)
    set(x, uniform(generator));
  return values;
}

int failures = 0;
// The largest difference, to the largest value.
template <class E>
void compare(const char *what, const std::vector<E> &found, const std::vector<double> &expected, double tolerance) {
  double error = 0, largest = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    error = std::fmax(error, std::fabs(value(found[i]) - expected[i]));
    largest = std::fmax(largest, std::fabs(expected[i]));
  }
  bool good = error <= tolerance * largest;
  failures += !good;
  std::printf("%s %-24s %.1e of %.1e\n", good ? "ok  " : "FAIL", what, error / largest, tolerance);
}

template <class E> struct Case {
  Index images, height, width, inputs, outputs, window;
  int threads = 1; // without OpenMP they take turns, each with its part of the work
  Index gap = 3; // values between the rows of x and of its gradient
  Index rows = images * height * width, ld = inputs + gap;
  using S = Compute<E>;
  std::vector<E> x = random<E>(rows * ld), weight = random<E>(outputs * inputs * window * window), grad = random<E>(rows * outputs);
  std::vector<E> grad_x = random<E>(rows * ld);
  std::vector<S> mean = random<S>(inputs), scale = random<S>(inputs, 0.5, 1.5), shift = random<S>(inputs);
  double tolerance = std::is_same<E, bf16>::value ? 0.02 : std::is_same<E, float>::value ? 2e-5 : 1e-13;

  double normed(Index row, Index c) const { return value(x[row * ld + c]) * scale[c] + shift[c]; }
  double rectified(Index row, Index c) const { return std::fmax(normed(row, c), 0); }

  // work(row of the output, row of x, tap)
  template <class Work> void for_taps(const Work &work) const {
    Index half = window / 2;
    for (Index n = 0; n < images; ++n)
      for (Index y = 0; y < height; ++y)
        for (Index p = 0; p < width; ++p)
          for (Index ty = 0; ty < window; ++ty)
            for (Index tx = 0; tx < window; ++tx) {
              Index sy = y + ty - half, sx = p + tx - half;
              if (0 <= sy && sy < height && 0 <= sx && sx < width)
                work((n * height + y) * width + p, (n * height + sy) * width + sx, ty * window + tx);
            }
  }

  void run(const Kernels &kernels) {
    std::printf("%d×%d×%d, %d to %d channels, window %d\n", int(images), int(height), int(width), int(inputs),
                int(outputs), int(window));
    std::vector<E> s(rows * inputs);
    std::vector<double> s_expected(rows * inputs);
    for (Index r = 0; r < rows; ++r)
      for (Index c = 0; c < inputs; ++c)
        s_expected[r * inputs + c] = rectified(r, c);
    kernels.prologue({x.data(), ld}, rows, inputs, {mean.data(), scale.data(), shift.data()}, s.data(), 1);
    compare("prologue", s, s_expected, tolerance);
    run_passes(kernels);
    if (kernels.convolve)
      run_convolution(kernels, s_expected);
  }

  // g goes to grad_x and to the sums, as a backward pass does it.
  std::vector<double> add(const std::vector<double> &g, std::vector<double> &sums) const {
    std::vector<double> result(rows * ld);
    for (Index i = 0; i < rows * ld; ++i)
      result[i] = value(grad_x[i]);
    for (Index r = 0; r < rows; ++r)
      for (Index c = 0; c < inputs; ++c) {
        double here = normed(r, c) > 0 ? g[r * inputs + c] : 0;
        sums[c] += here, sums[inputs + c] += here * (value(x[r * ld + c]) - mean[c]);
        result[r * ld + c] += here * scale[c];
      }
    return result;
  }

  void run_passes(const Kernels &kernels) {
    std::vector<E> g = random<E>(rows * inputs);
    std::vector<double> g_values, sums(2 * inputs), sums_expected(2 * inputs);
    for (E one : g)
      g_values.push_back(value(one));
    std::vector<double> expected = add(g_values, sums_expected);
    kernels.accumulate(g.data(), {x.data(), ld}, rows, inputs, {mean.data(), scale.data(), shift.data()},
                       {grad_x.data(), ld}, 1, sums.data(), 1);
    compare("accumulate", grad_x, expected, tolerance);
    compare("its sums", sums, sums_expected, 1e-5);
    std::vector<E> finished(rows * inputs);
    std::vector<double> finished_expected;
    for (Index r = 0; r < rows; ++r)
      for (Index c = 0; c < inputs; ++c)
        finished_expected.push_back(value(grad_x[r * ld + c]) - (value(x[r * ld + c]) - mean[c]) * scale[c] - shift[c]);
    kernels.finish({grad_x.data(), ld}, {x.data(), ld}, rows, inputs, mean.data(), shift.data(), scale.data(),
                   {finished.data(), inputs}, 1);
    compare("finish", finished, finished_expected, tolerance);
  }

  void run_convolution(const Kernels &kernels, const std::vector<double> &s_expected) {
    Index taps = window * window;
    Affine norm{mean.data(), scale.data(), shift.data()};
    Rows x_rows{x.data(), ld}, grad_rows{grad.data(), outputs};
    Convolution convolution{images, height, width, window, outputs, inputs, inputs * taps, taps, 1};
    auto w = [&](Index o, Index c, Index tap) { return value(weight[(o * inputs + c) * taps + tap]); };
    std::vector<E> out(rows * outputs), grad_weight(weight.size());
    std::vector<double> moments(2 * outputs), sums(2 * inputs), out_expected(rows * outputs), weight_expected(weight.size());
    std::vector<double> g(rows * inputs), sums_expected(2 * inputs), moments_expected(2 * outputs);
    for_taps([&](Index to, Index from, Index tap) {
      for (Index o = 0; o < outputs; ++o) {
        double of_out = value(grad[to * outputs + o]);
        for (Index c = 0; c < inputs; ++c) {
          double here = s_expected[from * inputs + c];
          out_expected[to * outputs + o] += here * w(o, c, tap);
          weight_expected[(o * inputs + c) * taps + tap] += here * of_out;
          g[from * inputs + c] += of_out * w(o, c, tap);
        }
      }
    });
    std::vector<double> grad_expected = add(g, sums_expected);
    int done = kernels.convolve(x_rows, &convolution, weight.data(), norm, {out.data(), outputs}, moments.data(), threads);
    failures += !done;
    compare("convolve", out, out_expected, tolerance);
    for (Index o = 0; o < outputs; ++o) { // of what was stored
      for (Index r = 0; r < rows; ++r)
        moments_expected[o] += value(out[r * outputs + o]) / rows;
      for (Index r = 0; r < rows; ++r)
        moments_expected[outputs + o] += std::pow(value(out[r * outputs + o]) - moments_expected[o], 2) / rows;
    }
    compare("its moments", moments, moments_expected, 1e-5);
    done = kernels.convolve_backward(grad_rows, x_rows, &convolution, weight.data(), norm, {grad_x.data(), ld}, 1,
                                     grad_weight.data(), sums.data(), threads);
    failures += !done;
    compare("gradient of the prefix", grad_x, grad_expected, tolerance);
    compare("gradient of the weight", grad_weight, weight_expected, tolerance);
    compare("sums", sums, sums_expected, tolerance);
  }
};

template <class E> void run_all(const Kernels &kernels) {
  Case<E>{2, 7, 6, 37, 19, 1}.run(kernels);
  Case<E>{1, 16, 16, 130, 48, 1}.run(kernels);
  Case<E>{2, 7, 6, 37, 19, 3}.run(kernels);
  Case<E>{1, 16, 14, 70, 12, 3}.run(kernels);
  Case<E>{1, 1, 1, 33, 3, 1}.run(kernels);
  Case<E>{3, 5, 13, 33, 12, 1, 3}.run(kernels);
  Case<E>{1, 1, 70, 12, 130, 1, 2}.run(kernels);
  Case<E>{2, 1, 5, 3, 17, 3}.run(kernels);
  Case<E>{2, 31, 9, 48, 33, 3, 3}.run(kernels);
  Case<E>{1, 3, 40, 12, 130, 3}.run(kernels);
}

// A stem of 7×7 windows, stride 2, over images of 3 channels, channels first.
void stem(const Kernels &kernels, Index images, Index height, Index width, Index outputs, int threads) {
  constexpr Index kChannels = 3, kWindow = 7;
  Index lines = (height + 1) / 2, pixels = (width + 1) / 2, lines_out = (lines + 1) / 2, pixels_out = (pixels + 1) / 2;
  auto x = random<float>(images * kChannels * height * width), weight = random<float>(outputs * kWindow * kWindow * kChannels);
  auto norm_weight = random<float>(outputs), norm_bias = random<float>(outputs), mean = random<float>(outputs);
  auto variance = random<float>(outputs, 0.5, 1.5);
  Stem s{images, kChannels, height, width, kChannels * height * width, height * width, width, 1, kWindow, kWindow, 2, 2, 3, 3,
         lines, pixels, outputs, x.data(), weight.data(), norm_weight.data(), norm_bias.data(), mean.data(), variance.data(), 1e-5};
  std::vector<float> out(images * lines_out * pixels_out * outputs);
  std::vector<double> expected(out.size(), 0); // no rectified value is less
  for (Index n = 0; n < images; ++n)
    for (Index line = 0; line < lines; ++line)
      for (Index pixel = 0; pixel < pixels; ++pixel)
        for (Index o = 0; o < outputs; ++o) {
          double sum = 0;
          for (Index tap = 0; tap < kWindow * kWindow; ++tap) {
            Index y = 2 * line + tap / kWindow - 3, p = 2 * pixel + tap % kWindow - 3;
            for (Index c = 0; c < kChannels && y >= 0 && y < height && p >= 0 && p < width; ++c)
              sum += double(x[((n * kChannels + c) * height + y) * width + p]) *
                     weight[(o * kWindow * kWindow + tap) * kChannels + c];
          }
          double normed = (sum - mean[o]) / std::sqrt(variance[o] + 1e-5) * norm_weight[o] + norm_bias[o];
          for (Index v = line / 2; v <= (line + 1) / 2 && v < lines_out; ++v)
            for (Index h = pixel / 2; h <= (pixel + 1) / 2 && h < pixels_out; ++h) {
              double &most = expected[((n * lines_out + v) * pixels_out + h) * outputs + o];
              most = std::fmax(most, normed);
            }
        }
  failures += !kernels.evaluate_stem(&s, {out.data(), outputs}, threads);
  compare("stem", out, expected, 1e-5);
}

} // namespace

int main(int count, char **arguments) {
  int best = count > 1 ? std::atoi(arguments[1]) : ed_best_instructions();
  for (int level = 0; level <= best; ++level) {
    std::printf("level %d, float32\n", level);
    run_all<float>(*ed_kernels(level, 0));
    if (ed_kernels(level, 0)->evaluate_stem) {
      stem(*ed_kernels(level, 0), 2, 37, 30, 20, 1);
      stem(*ed_kernels(level, 0), 1, 5, 3, 70, 3);
    }
    std::printf("level %d, float64\n", level);
    run_all<double>(*ed_kernels(level, 1));
    std::printf("level %d, bfloat16\n", level);
    run_all<bf16>(*ed_kernels(level, 2));
  }
  if (amx_products) {
    std::printf("%ld products in software, %ld threads that still use registers\n", amx_products(), amx_set_up());
    failures += amx_set_up() != 0;
  }
  return failures > 0;
}
