// Attention of a few queries per sequence over a cache of which every query sees its own columns: what a pass of a
// decode loop needs. One (sequence, head) at a time: scores of 16 columns x up to 16 queries, a softmax, the mixture.
//
// Numbers are handled as 32-bit words: one float, or a pair of bfloat16 that one instruction multiplies and adds up. In
// bfloat16 the values of two columns lie in pairs, number by number: that is how both instructions want them.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512BF16__)
#define BOZZETTO_VECTOR 1
#include <immintrin.h>
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define BOZZETTO_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace {

constexpr int64_t kColumns = 16;  // columns of a block: lanes of a register
constexpr int64_t kQueries = 16;  // queries of a block
constexpr int64_t kMostDim = 256;  // numbers per head that the matrix unit's path has room for

struct Shape {
  int64_t width, heads, dim, reach;                    // queries, heads, numbers per head, cache columns looked at
  int64_t q_row, q_place, cache_row, cache_head;       // strides in numbers; the heads of a query follow each other
  int64_t slots;                                       // columns of the cache
  bool steady;                                         // the same sums whatever the width
};

// Columns up to the last one that any of the queries sees.
int64_t columns_seen(const bool* seen, int64_t width, int64_t reach) {
  int64_t last = 0;
  for (int64_t w = 0; w < width; ++w) {
    int64_t c = reach;
    while (c > last && !seen[w * reach + c - 1]) --c;
    last = std::max(last, c);
  }
  return last;
}

#ifdef BOZZETTO_VECTOR

template <typename T>
struct Words;
template <>
struct Words<float> {
  static constexpr int64_t numbers = 1;
  static __m512 multiply_add(__m512 sum, __m512i a, uint32_t b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(b))), sum);
  }
};
template <>
struct Words<at::BFloat16> {
  static constexpr int64_t numbers = 2;
  static __m512 multiply_add(__m512 sum, __m512i a, uint32_t b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(static_cast<int>(b)));
  }
};

void transpose(__m512i* r) {  // 16 x 16 words
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

__m512 exponential(__m512 x) {  // x <= 0; relative error about 1e-7
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// What a thread needs for one sequence and head, words unless said otherwise.
struct Scratch {
  std::vector<uint32_t> keys, tail, weights;  // [blocks][words][16], the last columns, [queries][columns / numbers]
  std::vector<float> scores;                  // [queries][columns]
};

template <typename T>
void pack_keys(const T* keys, const Shape& s, int64_t columns, uint32_t* out) {
  const int64_t words = s.dim / Words<T>::numbers;
  __m512i row[16];
  for (int64_t c = 0; c < (columns + 31) / 32 * 32; c += kColumns) {
    for (int64_t d = 0; d < words; d += 16) {
      for (int i = 0; i < 16; ++i)
        row[i] = c + i < columns ? _mm512_loadu_si512(reinterpret_cast<const uint32_t*>(keys + (c + i) * s.dim) + d)
                                 : _mm512_setzero_si512();
      transpose(row);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (c / kColumns * words + d + i) * kColumns, row[i]);
    }
  }
}

// A sum has to wait for the one before it, so that few queries keep several.
constexpr int sums_of(int queries) { return queries == 1 ? 8 : queries == 2 ? 4 : 2; }

template <typename T, int N>
void score(const uint32_t* keys, const T* const* q, int64_t words, int64_t columns, int64_t padded, float* out) {
  constexpr int S = sums_of(N);
  for (int64_t c = 0; c < columns; c += kColumns) {
    __m512 sum[N][S];
    for (int w = 0; w < N; ++w)
      for (int i = 0; i < S; ++i) sum[w][i] = _mm512_setzero_ps();
    const uint32_t* block = keys + c * words;
    for (int64_t d = 0; d < words; d += S)
      for (int i = 0; i < S; ++i) {
        const __m512i k = _mm512_loadu_si512(block + (d + i) * kColumns);
        for (int w = 0; w < N; ++w)
          sum[w][i] = Words<T>::multiply_add(sum[w][i], k, reinterpret_cast<const uint32_t*>(q[w])[d + i]);
      }
    for (int w = 0; w < N; ++w) {
      for (int i = 1; i < S; ++i) sum[w][0] = _mm512_add_ps(sum[w][0], sum[w][i]);
      _mm512_storeu_ps(out + w * padded + c, sum[w][0]);
    }
  }
}

void store_weights(float* out, int64_t c, __m512 p) { _mm512_storeu_ps(out + c, p); }
void store_weights(at::BFloat16* out, int64_t c, __m512 p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c), (__m256i)_mm512_cvtneps_pbh(p));
}

// Scores -> weights of a query, and one over their sum.
template <typename T>
float soften(const float* scores, const bool* seen, int64_t reach, int64_t columns, float scale, T* weights) {
  const __m512 never = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 most = never;
  auto visible = [&](int64_t c) {
    const __mmask16 inside = static_cast<__mmask16>(c + 16 <= reach ? 0xffff : (1 << (reach - c)) - 1);
    return _mm_mask_test_epi8_mask(inside, _mm_maskz_loadu_epi8(inside, seen + c), _mm_set1_epi8(1));
  };
  for (int64_t c = 0; c < columns; c += kColumns)
    most = _mm512_mask_max_ps(most, visible(c), most, _mm512_loadu_ps(scores + c));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most)), by = _mm512_set1_ps(scale);
  __m512 total = _mm512_setzero_ps();
  for (int64_t c = 0; c < columns; c += kColumns) {
    const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + c), top), by);
    const __m512 p = _mm512_maskz_mov_ps(visible(c), exponential(x));
    total = _mm512_add_ps(total, p);
    store_weights(weights, c, p);
  }
  return 1.0f / _mm512_reduce_add_ps(total);
}

void store_out(float* out, __m512 x) { _mm512_storeu_ps(out, x); }
void store_out(at::BFloat16* out, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(x));
}

template <typename T, int N>
void mix(const uint32_t* values, const uint32_t* weights, const float* share, int64_t dim, int64_t pairs,
         int64_t padded, T* const* out) {
  constexpr int S = sums_of(N) / 2;
  for (int64_t d = 0; d < dim; d += 32) {
    __m512 sum[S][N][2];
    for (int i = 0; i < S; ++i)
      for (int w = 0; w < N; ++w) sum[i][w][0] = sum[i][w][1] = _mm512_setzero_ps();
    auto add = [&](int i, int64_t c) {
      const __m512i a = _mm512_loadu_si512(values + c * dim + d), b = _mm512_loadu_si512(values + c * dim + d + 16);
      for (int w = 0; w < N; ++w) {
        sum[i][w][0] = Words<T>::multiply_add(sum[i][w][0], a, weights[w * padded + c]);
        sum[i][w][1] = Words<T>::multiply_add(sum[i][w][1], b, weights[w * padded + c]);
      }
    };
    int64_t c = 0;
    for (; c + S <= pairs; c += S)
      for (int i = 0; i < S; ++i) add(i, c + i);
    for (; c < pairs; ++c) add(0, c);
    for (int w = 0; w < N; ++w)
      for (int half = 0; half < 2; ++half) {
        for (int i = 1; i < S; ++i) sum[0][w][half] = _mm512_add_ps(sum[0][w][half], sum[i][w][half]);
        store_out(out[w] + d + 16 * half, _mm512_mul_ps(sum[0][w][half], _mm512_set1_ps(share[w])));
      }
  }
}

template <typename T, int N>
void block(Scratch& room, const T* values, const T* const* q, const bool* seen, const Shape& s, int64_t columns,
           int64_t padded, T* const* out) {
  const int64_t words = s.dim / Words<T>::numbers, pairs = (columns + Words<T>::numbers - 1) / Words<T>::numbers;
  const int64_t held = padded / Words<T>::numbers;
  float share[N];
  score<T, N>(room.keys.data(), q, words, columns, padded, room.scores.data());
  for (int w = 0; w < N; ++w)
    share[w] = soften(room.scores.data() + w * padded, seen + w * s.reach, s.reach, columns,
                      1.0f / std::sqrt(static_cast<float>(s.dim)),
                      reinterpret_cast<T*>(room.weights.data() + w * held));
  mix<T, N>(reinterpret_cast<const uint32_t*>(values), room.weights.data(), share, s.dim, pairs, held, out);
}

#ifdef BOZZETTO_TILES

bool tiles_allowed() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, request, tile_data) == 0;
  return allowed;
}

// What tiles hold, rows of 64 bytes: 0-3 sums, [columns or queries][16]; 4-5 [columns][32 numbers] or weights [queries]
// [32 columns]; 6-7 what is multiplied with, [16 pairs][16]. sums: rows of the first six.
void configure_tiles(int64_t sums) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = i < 6 ? static_cast<uint8_t>(sums) : 16;
  _tile_loadconfig(&config);
}

// Queries as the matrix unit wants what is multiplied with: [dim / 32][16 pairs][16 queries].
void turn_queries(const at::BFloat16* q, const Shape& s, int64_t queries, uint32_t* out) {
  __m512i row[16];
  for (int64_t d = 0; d < s.dim / 2; d += 16) {
    for (int64_t w = 0; w < 16; ++w)
      row[w] = w < queries ? _mm512_loadu_si512(reinterpret_cast<const uint32_t*>(q + w * s.q_place) + d)
                           : _mm512_setzero_si512();
    transpose(row);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (d + i) * 16, row[i]);
  }
}

// [16 columns][16 queries] -> the scores of `queries` queries at these columns.
void turn_scores(const float* sums, int64_t queries, int64_t padded, float* out) {
  if (queries <= 4) {
    const __m512i at = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32(16));
    for (int64_t w = 0; w < queries; ++w) _mm512_storeu_ps(out + w * padded, _mm512_i32gather_ps(at, sums + w, 4));
    return;
  }
  __m512i row[16];
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(sums + 16 * i);
  transpose(row);
  for (int64_t w = 0; w < queries; ++w) _mm512_storeu_si512(out + w * padded, row[w]);
}

// Scores of up to 16 queries by the matrix unit; keys as they lie, 32 columns at a time.
void tile_scores(Scratch& room, const at::BFloat16* keys, const at::BFloat16* tail, const at::BFloat16* q,
                 const Shape& s, int64_t queries, int64_t padded) {
  alignas(64) uint32_t turned[kMostDim / 2 * 16];
  alignas(64) float sums[2][16 * 16];
  turn_queries(q, s, queries, turned);
  configure_tiles(16);
  for (int64_t c = 0; c < padded; c += 2 * kColumns) {
    const at::BFloat16* from = c + 2 * kColumns <= s.slots ? keys + c * s.dim : tail;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t d = 0; d < s.dim; d += 32) {
      _tile_loadd(6, turned + d / 2 * 16, 64);
      _tile_loadd(4, from + d, s.dim * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, from + kColumns * s.dim + d, s.dim * 2);
      _tile_dpbf16ps(1, 5, 6);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    turn_scores(sums[0], queries, padded, room.scores.data() + c);
    turn_scores(sums[1], queries, padded, room.scores.data() + c + kColumns);
  }
}

// The mixture of values in pairs of columns by the weights of up to 16 queries.
void tile_mix(Scratch& room, const at::BFloat16* values, const at::BFloat16* tail, const float* share, const Shape& s,
              int64_t queries, int64_t padded, at::BFloat16* out) {
  const int64_t held = padded / 2, out_place = s.heads * s.dim;
  alignas(64) float sum[kQueries][4 * 16];
  configure_tiles(queries);
  for (int64_t d = 0; d < s.dim; d += 64) {
    const bool whole = d + 32 < s.dim;  // 64 numbers left, or 32
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < padded; c += 2 * kColumns) {
      const at::BFloat16* from = (c + 2 * kColumns <= s.slots ? values + c * s.dim : tail) + 2 * d;
      _tile_loadd(5, room.weights.data() + c / 2, held * 4);
      _tile_loadd(6, from, s.dim * 4);
      _tile_dpbf16ps(0, 5, 6);
      _tile_loadd(7, from + 32, s.dim * 4);
      _tile_dpbf16ps(1, 5, 7);
      if (!whole) continue;
      _tile_loadd(6, from + 64, s.dim * 4);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, from + 96, s.dim * 4);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sum[0], 256);
    _tile_stored(1, sum[0] + 16, 256);
    _tile_stored(2, sum[0] + 32, 256);
    _tile_stored(3, sum[0] + 48, 256);
    for (int64_t w = 0; w < queries; ++w)
      for (int64_t i = 0; i < (whole ? 64 : 32); i += 16)
        store_out(out + w * out_place + d + i, _mm512_mul_ps(_mm512_load_ps(sum[w] + i), _mm512_set1_ps(share[w])));
  }
}

// As `block`, for all queries, by the matrix unit.
void tile_blocks(Scratch& room, const at::BFloat16* q, const at::BFloat16* keys, const at::BFloat16* values,
                 const bool* seen, const Shape& s, int64_t columns, int64_t padded, at::BFloat16* out) {
  const at::BFloat16 *key_tail = nullptr, *value_tail = nullptr;
  if (padded > s.slots) {  // the last 32 columns are not all there: a copy with nothing behind them
    const int64_t first = padded - 2 * kColumns, there = (s.slots - first) * s.dim;
    room.tail.assign(2 * kColumns * s.dim, 0);
    auto* copy = reinterpret_cast<at::BFloat16*>(room.tail.data());
    std::copy(keys + first * s.dim, keys + first * s.dim + there, copy);
    std::copy(values + first * s.dim, values + first * s.dim + there, copy + 2 * kColumns * s.dim);
    key_tail = copy, value_tail = copy + 2 * kColumns * s.dim;
  }
  float share[kQueries];
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.dim));
  for (int64_t w = 0; w < s.width; w += kQueries) {
    const int64_t queries = std::min(kQueries, s.width - w);
    tile_scores(room, keys, key_tail, q + w * s.q_place, s, queries, padded);
    for (int64_t i = 0; i < queries; ++i) {
      auto* weights = reinterpret_cast<at::BFloat16*>(room.weights.data() + i * padded / 2);
      const bool* sight = seen + (w + i) * s.reach;
      share[i] = soften(room.scores.data() + i * padded, sight, s.reach, columns, scale, weights);
      for (int64_t c = (columns + kColumns - 1) / kColumns * kColumns; c < padded; c += kColumns)
        store_weights(weights, c, _mm512_setzero_ps());
    }
    tile_mix(room, values, value_tail, share, s, queries, padded, out + w * s.heads * s.dim);
  }
  _tile_release();
}

#endif

template <typename T>
void attend_one(const T* q, const T* keys, const T* values, const bool* seen, T* out, const Shape& s, int64_t columns) {
  static thread_local Scratch room;
  const int64_t padded = (columns + 2 * kColumns - 1) / (2 * kColumns) * (2 * kColumns), out_place = s.heads * s.dim;
  room.weights.resize(kQueries * padded);
  room.scores.resize(kQueries * padded);
#ifdef BOZZETTO_TILES
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    if (s.dim <= kMostDim && tiles_allowed()) {
      tile_blocks(room, q, keys, values, seen, s, columns, padded, out);
      return;
    }
  }
#endif
  room.keys.resize(padded * s.dim / Words<T>::numbers);
  pack_keys(keys, s, columns, room.keys.data());
  for (int64_t w = 0; w < s.width;) {
    const int64_t left = s.steady ? 1 : s.width - w;
    const T* from[8];
    T* to[8];
    for (int64_t i = 0; i < std::min<int64_t>(left, 8); ++i) {
      from[i] = q + (w + i) * s.q_place;
      to[i] = out + (w + i) * out_place;
    }
    const bool* sight = seen + w * s.reach;
    if (left >= 8) {
      block<T, 8>(room, values, from, sight, s, columns, padded, to), w += 8;
    } else if (left >= 4) {
      block<T, 4>(room, values, from, sight, s, columns, padded, to), w += 4;
    } else if (left >= 2) {
      block<T, 2>(room, values, from, sight, s, columns, padded, to), w += 2;
    } else {
      block<T, 1>(room, values, from, sight, s, columns, padded, to), w += 1;
    }
  }
}

#else

template <typename T>
void attend_one(const T* q, const T* keys, const T* values, const bool* seen, T* out, const Shape& s, int64_t columns) {
  static thread_local std::vector<float> weight, sum;
  weight.resize(columns);
  sum.resize(s.dim);
  constexpr int64_t pair = std::is_same_v<T, at::BFloat16> ? 2 : 1;
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.dim));
  for (int64_t w = 0; w < s.width; ++w) {
    float most = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t c = 0; c < columns; ++c) {
      float dot = 0;
      for (int64_t d = 0; d < s.dim; ++d)
        dot += static_cast<float>(q[w * s.q_place + d]) * static_cast<float>(keys[c * s.dim + d]);
      weight[c] = seen[w * s.reach + c] ? dot * scale : -std::numeric_limits<float>::infinity();
      most = std::max(most, weight[c]);
    }
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t c = 0; c < columns; ++c) {
      const float p = std::exp(weight[c] - most);
      total += p;
      const T* value = values + c / pair * pair * s.dim + c % pair;
      for (int64_t d = 0; d < s.dim; ++d) sum[d] += p * static_cast<float>(value[d * pair]);
    }
    for (int64_t d = 0; d < s.dim; ++d) out[(w * s.heads) * s.dim + d] = static_cast<T>(sum[d] / total);
  }
}

#endif

// What a pass adds to the caches before it attends: keys and values of its own inputs and the columns they go to.
struct Fresh {
  const at::Tensor &k, &v, &slot;
};

// The numbers of one column of values, beside its neighbour's.
void put_value(at::BFloat16* pairs, const at::BFloat16* from, int64_t dim, int64_t side) {
  int64_t d = 0;
#ifdef BOZZETTO_VECTOR
  const __mmask32 mine = side ? 0xaaaaaaaau : 0x55555555u;
  for (; d + 16 <= dim; d += 16) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + d)));
    _mm512_mask_storeu_epi16(pairs + 2 * d, mine, side ? _mm512_slli_epi32(wide, 16) : wide);
  }
#endif
  for (; d < dim; ++d) pairs[2 * d + side] = from[d];
}

template <typename T>
void put_columns(const Fresh& fresh, int64_t r, int64_t h, int64_t b, const Shape& s, T* keys, T* values) {
  const int64_t* slot = fresh.slot.const_data_ptr<int64_t>() + b * s.width;
  for (int64_t w = 0; w < s.width; ++w) {
    const int64_t c = slot[w];
    if (c < 0 || c >= s.slots) continue;
    const T* k = fresh.k.const_data_ptr<T>() + r * fresh.k.stride(0) + w * fresh.k.stride(1) + h * s.dim;
    const T* v = fresh.v.const_data_ptr<T>() + r * fresh.v.stride(0) + w * fresh.v.stride(1) + h * s.dim;
    std::copy(k, k + s.dim, keys + c * s.dim);
    if constexpr (std::is_same_v<T, at::BFloat16>)
      put_value(values + c / 2 * 2 * s.dim, v, s.dim, c % 2);
    else
      std::copy(v, v + s.dim, values + c * s.dim);
  }
}

template <typename T>
void attend_all(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& seen,
                bool steady, const Fresh* fresh, at::Tensor& out) {
  const int64_t rows = q.size(0), batch = seen.size(0);
  Shape s{q.size(1),   q.size(2),   q.size(3),      seen.size(2),   q.stride(0),
          q.stride(1), keys.stride(0), keys.stride(1), keys.size(2), steady};
  const T *from = q.const_data_ptr<T>(), *k = keys.const_data_ptr<T>(), *v = values.const_data_ptr<T>();
  const bool* sight = seen.const_data_ptr<bool>();
  T* to = out.mutable_data_ptr<T>();
  T *new_k = fresh ? keys.mutable_data_ptr<T>() : nullptr, *new_v = fresh ? values.mutable_data_ptr<T>() : nullptr;
  std::vector<int64_t> columns(batch);
  for (int64_t b = 0; b < batch; ++b) columns[b] = columns_seen(sight + b * s.width * s.reach, s.width, s.reach);
  at::parallel_for(0, rows * s.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r = task / s.heads, h = task % s.heads, b = r % batch, cache = r * s.cache_row + h * s.cache_head;
      if (fresh) put_columns<T>(*fresh, r, h, b, s, new_k + cache, new_v + cache);
      attend_one<T>(from + r * s.q_row + h * s.dim, k + cache, v + cache, sight + b * s.width * s.reach,
                    to + (r * s.width * s.heads + h) * s.dim, s, columns[b]);
    }
  });
}

void check(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& seen) {
  const bool half = q.scalar_type() == at::kBFloat16;
  TORCH_CHECK(q.dim() == 4 && keys.dim() == 4 && values.dim() == (half ? 5 : 4) && seen.dim() == 3,
              "attend: wrong number of dimensions");
  TORCH_CHECK(q.stride(3) == 1 && q.stride(2) == q.size(3), "attend: the heads of a query have to follow each other");
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous() && seen.is_contiguous(),
              "attend: caches have to be contiguous");
  TORCH_CHECK(q.size(3) % 32 == 0 && seen.size(2) <= keys.size(2) && q.size(2) == keys.size(1) &&
                  q.size(0) % seen.size(0) == 0 && keys.numel() == values.numel(),
              "attend: wrong shape");
}

at::Tensor run(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& seen,
               bool steady, const Fresh* fresh) {
  check(q, keys, values, seen);
  at::Tensor out = at::empty({q.size(0), q.size(1), q.size(2), q.size(3)}, q.options());
  if (q.scalar_type() == at::kBFloat16)
    attend_all<at::BFloat16>(q, keys, values, seen, steady, fresh, out);
  else
    attend_all<float>(q, keys, values, seen, steady, fresh, out);
  return out;
}

at::Tensor attend(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& seen,
                  bool steady) {
  return run(q, keys, values, seen, steady, nullptr);
}

at::Tensor append_attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor& keys,
                         at::Tensor& values, const at::Tensor& slot, const at::Tensor& seen, bool steady) {
  for (const at::Tensor& part : {k, v})
    TORCH_CHECK(part.sizes() == q.sizes() && part.scalar_type() == q.scalar_type() && part.stride(3) == 1 &&
                    part.stride(2) == part.size(3),
                "append_attend: keys and values have to be shaped as queries, their heads one after the other");
  TORCH_CHECK(slot.is_contiguous() && slot.dim() == 2 && slot.size(0) == seen.size(0) && slot.size(1) == q.size(1) &&
                  slot.scalar_type() == at::kLong,
              "append_attend: wrong slots");
  const Fresh fresh{k, v, slot};
  return run(q, keys, values, seen, steady, &fresh);
}

}  // namespace

TORCH_LIBRARY(bozzetto, library) {
  library.def("attend(Tensor q, Tensor keys, Tensor values, Tensor seen, bool steady) -> Tensor");
  library.def("append_attend(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor slot, "
              "Tensor seen, bool steady) -> Tensor");
}
TORCH_LIBRARY_IMPL(bozzetto, CPU, library) { 
  library.impl("attend", &attend);
  library.impl("append_attend", &append_attend);
}
