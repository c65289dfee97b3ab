// The Gumbel noise of laws/noise.py, eight numbers at a time in float64.
#pragma once
#include "lanes.h"

namespace bozzetto {

typedef double Doubles __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));
constexpr int64_t kDoubles = 8;

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

// Row of `count` numbers of a key.
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
