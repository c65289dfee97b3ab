// As many 32-bit numbers at a time as a register holds, in the compiler's own vector types (wider ones are kept in memory
// and are up to fifteen times slower). A word holds one float32, or two neighbouring numbers of bfloat16 that are multiplied with two others and added up.
#pragma once
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace bozzetto {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kSums = 24;  // kSums: registers that sums may take
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8, kSums = 12;
#elif defined(__aarch64__)
constexpr int64_t kLanes = 4, kSums = 24;
#else
constexpr int64_t kLanes = 4, kSums = 12;
#endif

struct bf16 {
  uint16_t bits;
};

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Signed __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

template <typename V>
inline V loaded(const void* from) {
  V out;
  std::memcpy(&out, from, sizeof(V));
  return out;
}

template <typename V>
inline void stored(void* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

template <typename T>
using Lanes = std::conditional_t<std::is_same_v<T, float>, Words, Halves>;
template <typename T>
constexpr int64_t numbers_of = std::is_same_v<T, float> ? 1 : 2;  // in a word

inline Floats widened(Words bits) { return (Floats)bits; }
inline Floats widened(Halves bits) { return (Floats)(__builtin_convertvector(bits, Words) << 16); }
inline Words narrowed(Floats y, const float*) { return (Words)y; }
inline Halves narrowed(Floats y, const bf16*) {  // to the nearest, ties to even; there are no other cases here
  const Words bits = (Words)y;
  return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
}

template <typename T>
inline Floats rounded(Floats y) {
  return widened(narrowed(y, static_cast<const T*>(nullptr)));
}

inline float number(float x) { return x; }
inline float number(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline void assign(float& to, float x) { to = x; }
inline void assign(bf16& to, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  to.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <typename T>
inline Floats some(const T* from, int64_t count = kLanes) {
  if (count >= kLanes) return widened(loaded<Lanes<T>>(from));
  Lanes<T> bits{};
  std::memcpy(&bits, from, count * sizeof(T));
  return widened(bits);
}

template <typename T>
inline void put(Floats y, T* to, int64_t count = kLanes) {
  const auto bits = narrowed(y, static_cast<const T*>(nullptr));
  if (count >= kLanes)
    stored(to, bits);
  else
    std::memcpy(to, &bits, count * sizeof(T));
}

inline Floats all(float x) { return Floats{} + x; }

inline Floats exponential(Floats x) {  // relative error about 1e-7
  x = x < -87.0f ? Floats{} - 87.0f : x > 87.0f ? Floats{} + 87.0f : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // its last bits are the power of two
  const Floats n = shifted - 12582912.0f;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + c;
  p = p * r * r + r + 1.0f;
  return (Floats)((Words)p + ((Words)shifted << 23));
}

inline Floats error_function(Floats x) {  // absolute error below 3e-7: Abramowitz and Stegun, 7.1.26
  const Floats size = x < 0 ? -x : x, t = 1.0f / (1.0f + 0.3275911f * size);
  Floats p = Floats{} + 1.061405429f;
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + c;
  const Floats found = 1.0f - p * t * exponential(-size * size);
  return x < 0 ? -found : found;
}

// Sums and maxima over the lanes, always in the same order.
inline float summed(Floats x) {
  for (int step = kLanes / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  return x[0];
}
inline float largest(Floats x) {
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, x[i]);
  return most;
}

// a b + c, rounded once. Said outright: what a compiler fuses by itself depends on the loop around it (GCC, tuned for
// AMD's processors, fuses no chains of one sum), and with it the bits of a row would depend on the rows beside it.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// sum + a b of a register of words a with one word b.
template <typename T>
inline Floats dotted(Floats sum, Words a, uint32_t b) {
  if constexpr (std::is_same_v<T, float>) {
    return fused((Floats)a, all(std::bit_cast<float>(b)), sum);
  } else {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(static_cast<int>(b)));
#else
    sum = fused((Floats)(a << 16), all(std::bit_cast<float>(b << 16)), sum);
    return fused((Floats)(a & 0xffff0000u), all(std::bit_cast<float>(b & 0xffff0000u)), sum);
#endif
  }
}

// The threads that run a pass together: each does its share of a phase and waits for the others. Phases are short, so
// that waiting is a look at a counter; a thread that waits longer lets others have its core.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Meeting {
  std::atomic<int64_t> here{0}, round{0};

  void meet(int64_t size) {
    const int64_t now = round.load(std::memory_order_acquire);
    if (here.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      here.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    for (int64_t looks = 0; round.load(std::memory_order_acquire) == now; ++looks)
      if (looks > kPatience)
        sched_yield();
      else
        pause();
  }

  static constexpr int64_t kPatience = 2000;
};

struct Team {
  int64_t id, size;
  Meeting* meeting;

  void meet() const {
    if (size > 1) meeting->meet(size);
  }
  int64_t first(int64_t count) const { return count * id / size; }
  int64_t last(int64_t count) const { return count * (id + 1) / size; }
};

template <typename Work>
void together(int64_t threads, Work work) {
  if (threads <= 1) return work(Team{0, 1, nullptr});
  Meeting meeting;
#pragma omp parallel num_threads(static_cast<int>(threads))
  work(Team{omp_get_thread_num(), omp_get_num_threads(), &meeting});
}

}  // namespace bozzetto
