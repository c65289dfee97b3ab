// Attention of a few queries per sequence over a cache of which every query sees its own columns: what a pass of a
// decode loop needs. A query's result has the same bits whatever queries stand beside it, however wide the pass is.
//
// Caches are laid out as the sums want them, for one (sequence, head) at a time. Keys: [S / lanes][words of a key]
// [lanes], a word of as many neighbouring columns as a register holds side by side. Values: [words of a column][D], a word being one number, or in
// bfloat16 the numbers of columns 2 i and 2 i + 1. D is the head's numbers filled up with zeros to whole
// registers.
#pragma once
#include "lanes.h"

namespace bozzetto {

constexpr int kMostQueries = 8;
template <int N>  // registers of columns, or of numbers, for N queries
constexpr int at_once = N * 4 <= kSums ? 4 : N * 2 <= kSums ? 2 : 1;

struct Head {
  int64_t dim, wide, slots;  // numbers; filled up; columns of the cache, a multiple of 64

  int64_t numbers() const { return slots * wide; }  // of keys or values of one sequence and head
};

template <typename T>
void put_key(T* keys, const Head& h, int64_t column, const T* from) {  // from: [wide]
  constexpr int64_t per = numbers_of<T>;
  T* to = keys + (column / kLanes * h.wide / per * kLanes + column % kLanes) * per;
  for (int64_t d = 0; d < h.wide; d += per) std::memcpy(to + d * kLanes, from + d, 4);
}

template <typename T>
void put_value(T* values, const Head& h, int64_t column, const T* from) {
  constexpr int64_t per = numbers_of<T>;
  T* to = values + column / per * per * h.wide + column % per;
  for (int64_t d = 0; d < h.wide; ++d) to[d * per] = from[d];
}

template <typename T>
void move_column(T* keys, T* values, const Head& h, int64_t from, int64_t to) {
  constexpr int64_t per = numbers_of<T>;
  const auto key = [&](int64_t c) { return keys + (c / kLanes * h.wide / per * kLanes + c % kLanes) * per; };
  for (int64_t d = 0; d < h.wide; d += per) std::memcpy(key(to) + d * kLanes, key(from) + d * kLanes, 4);
  const auto value = [&](int64_t c) { return values + c / per * per * h.wide + c % per; };
  for (int64_t d = 0; d < h.wide; ++d) value(to)[d * per] = value(from)[d * per];
}

// What a thread needs for one block of queries.
struct Scratch {
  std::vector<float> scores, weights;
};

// Scores of N queries [wide] at `columns` columns, a multiple of 64.
template <typename T, int N>
void score(const T* keys, const T* const* q, const Head& h, int64_t columns, float* out) {
  constexpr int64_t per = numbers_of<T>;
  constexpr int B = at_once<N>;  // blocks of columns at a time
  const int64_t words = h.wide / per;
  for (int64_t c = 0; c < columns; c += B * kLanes) {
    Floats sum[B][N];
    for (int b = 0; b < B; ++b)
      for (int w = 0; w < N; ++w) sum[b][w] = Floats{};
    const T* block = keys + c * h.wide;
    for (int64_t d = 0; d < words; ++d)
      for (int b = 0; b < B; ++b) {
        const Words k = loaded<Words>(block + (b * words + d) * kLanes * per);
        for (int w = 0; w < N; ++w) sum[b][w] = dotted<T>(sum[b][w], k, loaded<uint32_t>(q[w] + d * per));
      }
    for (int b = 0; b < B; ++b)
      for (int w = 0; w < N; ++w) stored(out + w * columns + c + b * kLanes, sum[b][w]);
  }
}

// Scores -> weights in T of a query, and one over their sum.
template <typename T>
float soften(const float* scores, const uint8_t* seen, int64_t columns, float scale, T* weights) {
  const Floats never = all(-std::numeric_limits<float>::infinity());
  const auto at = [&](int64_t c) {
    const Words shown = __builtin_convertvector(loaded<Bytes>(seen + c), Words);
    return shown != 0 ? loaded<Floats>(scores + c) : never;
  };
  Floats most = never, total{};
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Floats x = at(c);
    most = x > most ? x : most;
  }
  const float top = largest(most);
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Floats x = at(c), p = exponential((x - top) * scale);
    const Floats shown = x == never ? Floats{} : p;
    total += shown;
    put(shown, weights + c);
  }
  return 1.0f / summed(total);
}

template <typename T, int N>
void mix(const T* values, const T* weights, const float* share, const Head& h, int64_t columns, T* const* out) {
  constexpr int64_t per = numbers_of<T>;
  constexpr int B = at_once<N>;  // registers of numbers at a time
  for (int64_t d = 0; d < h.wide; d += B * kLanes) {
    const int blocks = static_cast<int>(std::min<int64_t>(B, (h.wide - d) / kLanes));
    Floats sum[B][N];
    for (int b = 0; b < B; ++b)
      for (int w = 0; w < N; ++w) sum[b][w] = Floats{};
    const auto add = [&](int b, const T* from, int64_t c) {
      const Words v = loaded<Words>(from + b * kLanes * per);
      for (int w = 0; w < N; ++w) sum[b][w] = dotted<T>(sum[b][w], v, loaded<uint32_t>(weights + w * columns + c));
    };
    const T* from = values + d * per;
    if (blocks == B)
      for (int64_t c = 0; c < columns; c += per, from += per * h.wide)
        for (int b = 0; b < B; ++b) add(b, from, c);
    else
      for (int64_t c = 0; c < columns; c += per, from += per * h.wide)
        for (int b = 0; b < blocks; ++b) add(b, from, c);
    for (int b = 0; b < blocks; ++b)
      for (int w = 0; w < N; ++w) put(sum[b][w] * share[w], out[w] + d + b * kLanes, h.dim - d - b * kLanes);
  }
}

// Queries [N][wide] of one sequence and head -> mixtures [dim]; seen[w]: `columns` bytes of a query; shares: where a
// query's weights are wanted, float32 [columns], else null.
template <typename T, int N>
void attend(Scratch& room, const T* keys, const T* values, const T* const* q, const uint8_t* const* seen, const Head& h,
            int64_t columns, T* const* out, float* const* shares) {
  float share[N];
  T* weights = reinterpret_cast<T*>(room.weights.data());
  score<T, N>(keys, q, h, columns, room.scores.data());
  for (int w = 0; w < N; ++w) {
    share[w] = soften(room.scores.data() + w * columns, seen[w], columns, 1.0f / std::sqrt(static_cast<float>(h.dim)),
                      weights + w * columns);
    if (shares != nullptr && shares[w] != nullptr)
      for (int64_t c = 0; c < columns; ++c) shares[w][c] += number(weights[w * columns + c]) * share[w];
  }
  mix<T, N>(values, weights, share, h, columns, out);
}

template <typename T>
void attend_all(Scratch& room, const T* keys, const T* values, const T* const* q, const uint8_t* const* seen,
                int64_t queries, const Head& h, int64_t columns, T* const* out, float* const* shares) {
  room.scores.resize(kMostQueries * columns);
  room.weights.resize(kMostQueries * columns);
  for (int64_t w = 0; w < queries;) {
    const int64_t left = queries - w;
    float* const* kept = shares == nullptr ? nullptr : shares + w;
    const auto some = [&]<int N>() {
      attend<T, N>(room, keys, values, q + w, seen + w, h, columns, out + w, kept);
      w += N;
    };
    if (left >= 8)
      some.template operator()<8>();
    else if (left >= 4)
      some.template operator()<4>();
    else if (left >= 2)
      some.template operator()<2>();
    else
      some.template operator()<1>();
  }
}

}  // namespace bozzetto
