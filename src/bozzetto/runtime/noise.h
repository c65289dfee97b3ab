// The noise of laws/noise.py in float64; Gumbel's a register of numbers at a time.
#pragma once
#include "lanes.h"

namespace bozzetto {

typedef double Doubles __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Longs __attribute__((vector_size(4 * kLanes)));
constexpr int64_t kDoubles = kLanes / 2;

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u, kMix1 = 0xBF58476D1CE4E5B9u, kMix2 = 0x94D049BB133111EBu;

template <typename V>
inline V mixed(V x) {
  x = (x ^ (x >> 30)) * kMix1;
  x = (x ^ (x >> 27)) * kMix2;
  return x ^ (x >> 31);
}

template <typename V>
inline V folded(uint64_t key, V counter) {
  return mixed<V>((key ^ mixed<V>(counter)) + kGolden);
}

// Of normal numbers > 0. With x = 2^k m, m near 1, and s = (m - 1) / (m + 1): log m = 2 s + s^3 (2/3 + 2/5 s^2 + ...),
// the series cut off and its coefficients fitted (fdlibm's, error below one unit in the last place).
inline Doubles logarithm(Doubles x) {
  constexpr double fitted[] = {1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01,
                               2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                               6.666666666666735130e-01};
  Longs bits = (Longs)x + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);  // m from sqrt(1/2) to sqrt(2)
  const Doubles k = __builtin_convertvector((bits >> 52), Doubles) - 1023.0;
  bits = (bits & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu;
  const Doubles f = (Doubles)bits - 1.0, s = f / (f + 2.0), z = s * s, half = 0.5 * f * f;
  Doubles r = Doubles{};
  for (double c : fitted) r = r * z + c;
  return k * 6.93147180369123816490e-01 - ((half - (s * (half + r * z) + k * 1.90821492927058770002e-10)) - f);
}

inline double uniform(uint64_t key) {
  return std::min((static_cast<double>(key >> 11) + 0.5) * 0x1p-53, 1.0 - 0x1p-53);
}

// The number that a standard normal stays below with chance u (Wichura 1988, AS 241: error below 1e-15 of it).
inline double quantile(double u) {
  constexpr double near[2][8] = {
      {3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
       4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3},
      {1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3, 2.1213794301586595867e4,
       3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3}};
  constexpr double far[2][8] = {
      {1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
       1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4},
      {1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1, 1.48103976427480074590e-1,
       1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9}};
  constexpr double last[2][8] = {
      {6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
       2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7},
      {1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2, 7.86869131145613259100e-4,
       1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15}};
  const auto ratio = [](const double (&c)[2][8], double r) {
    double top = 0, bottom = 0;
    for (int i = 7; i >= 0; --i) top = top * r + c[0][i], bottom = bottom * r + c[1][i];
    return top / bottom;
  };
  const double q = u - 0.5;
  if (std::abs(q) <= 0.425) return q * ratio(near, 0.180625 - q * q);
  const double r = std::sqrt(-std::log(q < 0 ? u : 1 - u));
  const double found = r <= 5 ? ratio(far, r - 1.6) : ratio(last, r - 5);
  return q < 0 ? -found : found;
}

// Standard normal noise: row of `count` numbers of a key.
inline void normal_row(uint64_t key, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(quantile(uniform(folded<uint64_t>(key, i))));
}

// Gumbel noise: row of `count` numbers of a key.
inline void gumbel_row(uint64_t key, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kDoubles) {
    Longs number;
    for (int64_t j = 0; j < kDoubles; ++j) number[j] = static_cast<uint64_t>(i + j);
    const Longs bits = folded<Longs>(key, number) >> 11;
    Doubles u = (__builtin_convertvector(bits, Doubles) + 0.5) * 0x1p-53;
    const Doubles most = Doubles{} + (1.0 - 0x1p-53);
    u = u < most ? u : most;
    const Doubles found = -logarithm(-logarithm(u));
    for (int64_t j = 0; j < std::min(kDoubles, count - i); ++j) out[i + j] = static_cast<float>(found[j]);
  }
}

}  // namespace bozzetto
