// y = x W^T for few rows x, on processors without a matrix unit: as fast as the weights can be read while rows are few,
// near the peak of multiply-adds from about eight rows on: of pairs of bfloat16 where the processor has such
// instructions, else of float32. Sums run over the input numbers in order, whatever
// the number of rows, so that a row has the same bits in a call of any size.
//
// Weights lie in groups of 32 columns, [group][input number or pair of them][2][16]: one stream of memory. In bfloat16 a
// 32-bit word holds two neighbouring input numbers of a column; half a word is a float32 once the rest of it is cleared.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLanes = 16, kPanels = 2, kGroup = kLanes * kPanels;
constexpr int64_t kStep = 128;  // bytes of a group that belong to a 32-bit word of a row
constexpr int64_t kAhead = 128 * kStep;  // bytes that are fetched before they are needed
#if defined(__AVX512F__)
constexpr int kMostRows = 8;  // of a block: 2 kMostRows sums are held in registers
#else
constexpr int kMostRows = 4;
#endif

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <typename V>
V loaded(const void* from) {
  V out;
  std::memcpy(&out, from, sizeof(V));
  return out;
}

template <typename T>
using Lanes = std::conditional_t<std::is_same_v<T, float>, Words, Halves>;

Floats widened(Words bits) { return (Floats)bits; }
Floats widened(Halves bits) { return (Floats)(__builtin_convertvector(bits, Words) << 16); }

Words narrowed(Floats y, const float*) { return (Words)y; }
Halves narrowed(Floats y, const at::BFloat16*) {  // to the nearest, ties to even; there are no other cases here
  const Words bits = (Words)y;
  return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
}

template <typename T>
Floats rounded(Floats y) {
  return widened(narrowed(y, static_cast<const T*>(nullptr)));
}

template <typename T>
Floats some(const T* from, int64_t count) {
  Lanes<T> bits{};
  std::memcpy(&bits, from, (count < kLanes ? count : kLanes) * sizeof(T));
  return widened(bits);
}

template <typename T>
void put(Floats y, T* to, int64_t count) {
  const auto bits = narrowed(y, static_cast<const T*>(nullptr));
  std::memcpy(to, &bits, (count < kLanes ? count : kLanes) * sizeof(T));
}

Floats exponential(Floats x) {  // relative error about 1e-7
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

#if defined(__AVX512BF16__)
constexpr bool kDots = true;
#else
constexpr bool kDots = false;
#endif
// Whether two numbers of bfloat16 are multiplied at a time. Then rows are read as they lie; else they are handed over in
// float32, [K][rows of the block].
template <typename T>
constexpr bool in_pairs = kDots && std::is_same_v<T, at::BFloat16>;
template <typename T>
using Taken = std::conditional_t<in_pairs<T>, T, float>;

// Weights to fetch beside a sum: those a little ahead in G groups, or others, `stride` bytes further at every step.
template <int G>
struct Near {
  int64_t apart;  // bytes from group to group

  void operator()(const void* weight, int64_t) const {
    const char* from = static_cast<const char*>(weight) + kAhead;
    for (int g = 0; g < G; ++g) {
      __builtin_prefetch(from + g * apart);
      __builtin_prefetch(from + g * apart + kStep / 2);
    }
  }
};
struct Far {
  const char* from;
  int64_t stride;

  void operator()(const void*, int64_t step) const { __builtin_prefetch(from + step * stride); }
};

// Sums of R rows and P panels: those of a group, or of the groups that follow one another.
template <typename T, int R, int P, typename Fetch>
void multiply(const Taken<T>* x, const T* weight, int64_t inputs, Fetch fetch, Floats (&sum)[R][P]) {
  const int64_t apart = inputs * kGroup;  // from group to group
  const auto panel = [apart](const T* step, int p) {
    return step + p / kPanels * apart + p % kPanels * (kStep / kPanels / static_cast<int64_t>(sizeof(T)));
  };
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) sum[r][p] = Floats{};
  if constexpr (in_pairs<T>) {
#if defined(__AVX512BF16__)
    for (int64_t k = 0; k < inputs; k += 2, weight += 2 * kGroup) {
      fetch(weight, k / 2);
      __m512bh both[P];
      for (int p = 0; p < P; ++p) both[p] = (__m512bh)_mm512_loadu_si512(panel(weight, p));
      for (int r = 0; r < R; ++r) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(loaded<int>(x + r * inputs + k));
        for (int p = 0; p < P; ++p) sum[r][p] = (Floats)_mm512_dpbf16_ps((__m512)sum[r][p], both[p], pair);
      }
    }
#endif
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    for (int64_t k = 0; k < inputs; k += 2, weight += 2 * kGroup, x += 2 * R) {
      fetch(weight, k / 2);
      Floats even[P], odd[P];
      for (int p = 0; p < P; ++p) {
        const Words both = loaded<Words>(panel(weight, p));
        even[p] = (Floats)(both << 16);
        odd[p] = (Floats)(both & 0xffff0000u);
      }
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) sum[r][p] += even[p] * x[r];
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) sum[r][p] += odd[p] * x[R + r];
    }
  } else {
    for (int64_t k = 0; k < inputs; ++k, weight += kGroup, x += R) {
      fetch(weight, k);
      Floats one[P];
      for (int p = 0; p < P; ++p) one[p] = loaded<Floats>(panel(weight, p));
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) sum[r][p] += one[p] * x[r];
    }
  }
}

// Blocks of about as many rows each.
int64_t blocks_of(int64_t rows) { return (rows + kMostRows - 1) / kMostRows; }
int64_t first_row(int64_t rows, int64_t block) { return rows * block / blocks_of(rows); }

// The rows in float32, block by block, [block][K][rows of the block].
template <typename T>
void turned(const T* x, int64_t rows, int64_t inputs, float* out) {
  for (int64_t b = 0; b < blocks_of(rows); ++b) {
    const int64_t first = first_row(rows, b), count = first_row(rows, b + 1) - first;
    for (int64_t k = 0; k < inputs; ++k)
      for (int64_t r = 0; r < count; ++r) out[k * count + r] = static_cast<float>(x[(first + r) * inputs + k]);
    out += count * inputs;
  }
}

struct Shape {
  int64_t rows, inputs, columns;  // columns: numbers per row of the result
  bool gated;                     // panels take turns: a gate, what it lets through
};

template <typename T>
struct Product {
  Shape s;
  const T *weight, *bias, *more;
  T* out;

  // Few rows have too few sums to keep the multipliers busy, and take two groups at a time. With many rows each block
  // fetches its share of the next group, so that memory is read all the time.
  template <int R, int G = 1>
  void block(const Taken<T>* x, int64_t group, int64_t row, int64_t turn) const {
    constexpr int P = G * kPanels;
    Floats sum[R][P];
    const T* own = weight + group * s.inputs * kGroup;
    const int64_t bytes = s.inputs * kGroup * sizeof(T), blocks = blocks_of(s.rows);
    if (blocks == 1) {
      multiply<T, R, P>(x, own, s.inputs, Near<G>{bytes}, sum);
    } else {
      const char* next = reinterpret_cast<const char*>(own) + bytes + bytes * turn / blocks;
      multiply<T, R, P>(x, own, s.inputs, Far{next, kStep / blocks}, sum);
    }
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) {
        const int64_t panel = group * kPanels + p;
        if (!s.gated)
          finish(sum[r][p], nullptr, row + r, panel * kLanes);
        else if (p % kPanels == 0)
          finish(sum[r][p], &sum[r][p + 1], row + r, panel / kPanels * kLanes);
      }
  }

  void finish(Floats y, const Floats* up, int64_t row, int64_t column) const {
    const int64_t count = std::min(kLanes, s.columns - column);
    if (count <= 0) return;  // columns that only fill up a group
    if (up != nullptr) {
      const Floats gate = rounded<T>(y);  // as if somebody else multiplied the two
      y = gate / (1.0f + exponential(-gate)) * rounded<T>(*up);
    }
    if (bias != nullptr) y += some(bias + column, count);
    if (more != nullptr) y += some(more + row * s.columns + column, count);
    put(y, out + row * s.columns + column, count);
  }

  void all_rows(const Taken<T>* x, int64_t group) const {
    for (int64_t b = 0; b < blocks_of(s.rows); ++b) {
      const int64_t row = first_row(s.rows, b), count = first_row(s.rows, b + 1) - row;
      switch (count) {
        case 1: block<1>(x, group, row, b); break;
        case 2: block<2>(x, group, row, b); break;
        case 3: block<3>(x, group, row, b); break;
        case 4: block<4>(x, group, row, b); break;
#if defined(__AVX512F__)
        case 5: block<5>(x, group, row, b); break;
        case 6: block<6>(x, group, row, b); break;
        case 7: block<7>(x, group, row, b); break;
        default: block<8>(x, group, row, b); break;
#else
        default: break;
#endif
      }
      x += count * s.inputs;
    }
  }

  void two_groups(const Taken<T>* x, int64_t group, int64_t end) const {
    if (group + 1 == end || s.rows > 4) {
      for (int64_t last = std::min(group + 2, end); group < last; ++group) all_rows(x, group);
      return;
    }
    switch (s.rows) {
      case 1: return block<1, 2>(x, group, 0, 0);
      case 2: return block<2, 2>(x, group, 0, 0);
      case 3: return block<3, 2>(x, group, 0, 0);
      case 4: return block<4, 2>(x, group, 0, 0);
      default: return;
    }
  }
};

template <typename T>
void multiply_all(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& more, const Shape& s, at::Tensor& out) {
  const Product<T> product{s, weight.const_data_ptr<T>(), bias ? bias->const_data_ptr<T>() : nullptr,
                           more ? more->const_data_ptr<T>() : nullptr, out.mutable_data_ptr<T>()};
  const T* from = x.const_data_ptr<T>();
  at::parallel_for(0, weight.size(0), 1, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> held;
    const Taken<T>* rows;
    if constexpr (in_pairs<T>) {
      rows = from;
    } else {
      held.resize(s.rows * s.inputs);
      turned(from, s.rows, s.inputs, held.data());
      rows = held.data();
    }
    for (int64_t group = begin; group < end; group += 2) product.two_groups(rows, group, end);
  });
}

at::Tensor linear(const at::Tensor& given, const at::Tensor& weight, int64_t columns, bool gated,
                  const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& given_more) {
  const at::Tensor x = given.contiguous();
  const std::optional<at::Tensor> more = given_more ? std::optional(given_more->contiguous()) : std::nullopt;
  const int64_t inputs = x.size(-1), rows = x.numel() / std::max<int64_t>(1, inputs);
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == x.scalar_type() &&
                  weight.numel() == weight.size(0) * inputs * kGroup &&
                  weight.size(0) * kGroup >= columns * (gated ? 2 : 1),
              "linear: the weights are not laid out for this");
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = columns;
  for (const auto& part : {bias, more})
    TORCH_CHECK(!part || (part->is_contiguous() && part->scalar_type() == x.scalar_type()), "linear: wrong type");
  TORCH_CHECK((!bias || bias->numel() == columns) && (!more || more->numel() == rows * columns), "linear: wrong shape");
  at::Tensor out = at::empty(sizes, x.options());
  const Shape shape{rows, inputs, columns, gated};
  if (x.scalar_type() == at::kBFloat16)
    multiply_all<at::BFloat16>(x, weight, bias, more, shape, out);
  else
    multiply_all<float>(x, weight, bias, more, shape, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bozzetto, library) {
  library.def("linear(Tensor x, Tensor weight, int columns, bool gated, Tensor? bias, Tensor? more) -> Tensor");
}
TORCH_LIBRARY_IMPL(bozzetto, CPU, library) { library.impl("linear", &linear); }
