// y = x W^T for few rows x: as fast as the weights can be read while rows are few, near the peak of multiply-adds from
// about eight rows on. Sums run over the input numbers in order, whatever the number of rows, so that a row has the
// same bits in a call of any size.
//
// Weights lie in groups of two registers of columns, [group][word of input numbers][2][lanes]: one stream of memory.
#pragma once
#include "lanes.h"

namespace bozzetto {

constexpr int64_t kPanels = 2, kGroup = kLanes * kPanels;
constexpr int64_t kStep = 4 * kGroup;    // bytes of a group that belong to a word of a row
constexpr int64_t kAhead = 128 * kStep;  // bytes that are fetched before they are needed
constexpr int kMostRows = kSums / kPanels;  // of a block, whose sums are held in registers

// A linear map: weight laid out as above, bias [columns] of the same type or null. gated: panels take turns, a gate and
// what it lets through; `columns` counts results.
struct Map {
  const void *weight, *bias;
  int64_t inputs, columns, gated;

  int64_t groups() const { return ((gated ? 2 : 1) * ((columns + kLanes - 1) / kLanes * kLanes) + kGroup - 1) / kGroup; }
};

// Where results go: rows of T, or of float32, added to rows of float32, or silu or gelu of them in rows of T.
struct Into {
  void* to;
  enum { kPlain, kFloat, kAdded, kSilu, kGelu } how;
};

template <int G>
struct Near {  // fetches the weights a little ahead in G groups
  int64_t apart;

  void operator()(const void* weight, int64_t) const {
    const char* from = static_cast<const char*>(weight) + kAhead;
    for (int g = 0; g < G; ++g) {
      for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(from + g * apart + line);
    }
  }
};
template <int Level>
struct Far {  // fetches other weights to a level of the caches (3: the first), `stride` bytes further at every step
  const char* from;
  int64_t stride;

  void operator()(const void*, int64_t step) const { __builtin_prefetch(from + step * stride, 0, Level); }
};

// Sums of R rows and P panels: those of a group, or of the groups that follow one another. x: rows of words.
template <typename T, int R, int P, typename Fetch>
inline void multiply(const T* x, const T* weight, int64_t inputs, Fetch fetch, Floats (&sum)[R][P]) {
  constexpr int64_t per = numbers_of<T>;
  const int64_t apart = inputs * kGroup;  // from group to group
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) sum[r][p] = Floats{};
  for (int64_t k = 0; k < inputs; k += per, weight += per * kGroup) {
    fetch(weight, k / per);
    Words both[P];
    for (int p = 0; p < P; ++p) both[p] = loaded<Words>(weight + p / kPanels * apart + p % kPanels * kLanes * per);
    for (int r = 0; r < R; ++r) {
      const uint32_t word = loaded<uint32_t>(x + r * inputs + k);
      for (int p = 0; p < P; ++p) sum[r][p] = dotted<T>(sum[r][p], both[p], word);
    }
  }
}

template <typename T>
struct Product {
  const Map& map;
  const T* x;
  int64_t rows;
  Into into;

  int64_t blocks() const { return (rows + kMostRows - 1) / kMostRows; }
  int64_t first_row(int64_t block) const { return rows * block / blocks(); }

  void finish(Floats y, const Floats* up, int64_t row, int64_t column) const {
    const int64_t count = std::min(kLanes, map.columns - column), at = row * map.columns + column;
    if (count <= 0) return;  // columns that only fill up a group
    if (up != nullptr) {
      const Floats gate = rounded<T>(y);  // as if somebody else multiplied the two
      y = gate / (1.0f + exponential(-gate)) * rounded<T>(*up);
    }
    if (map.bias != nullptr) y += some(static_cast<const T*>(map.bias) + column, count);
    if (into.how == Into::kSilu) y = y / (1.0f + exponential(-y));
    if (into.how == Into::kGelu) y = 0.5f * y * (1.0f + error_function(y * 0.70710678f));
    if (into.how != Into::kFloat && into.how != Into::kAdded) return put(y, static_cast<T*>(into.to) + at, count);
    float* to = static_cast<float*>(into.to) + at;
    put(into.how == Into::kAdded ? some(to, count) + y : y, to, count);
  }

  // Few rows have too few sums to keep the multipliers busy, and take two groups at a time. With many rows each block
  // fetches its share of the next group, so that memory is read all the time.
  template <int R, int G = 1>
  void block(int64_t group, int64_t row, int64_t turn) const {
    constexpr int P = G * kPanels;
    Floats sum[R][P];
    const T *own = static_cast<const T*>(map.weight) + group * map.inputs * kGroup, *from = x + row * map.inputs;
    const int64_t bytes = map.inputs * kGroup * sizeof(T);
    if (blocks() == 1) {
      multiply<T, R, P>(from, own, map.inputs, Near<G>{bytes}, sum);
    } else {
      const char* next = reinterpret_cast<const char*>(own) + bytes + bytes * turn / blocks();
      if (blocks() == 2)  // a group fills the first level, and the second block reads it from there once more
        multiply<T, R, P>(from, own, map.inputs, Far<2>{next, kStep / 2}, sum);
      else
        multiply<T, R, P>(from, own, map.inputs, Far<3>{next, kStep / blocks()}, sum);
    }
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) {
        const int64_t panel = group * kPanels + p;
        if (!map.gated)
          finish(sum[r][p], nullptr, row + r, panel * kLanes);
        else if (p % kPanels == 0)
          finish(sum[r][p], &sum[r][p + 1], row + r, panel / kPanels * kLanes);
      }
  }

  // One block of so many rows, up to kMostRows; of few it takes G groups.
  template <int R = kMostRows>
  void sized(int64_t count, int64_t group, int64_t row, int64_t turn) const {
    if constexpr (R > 1)
      if (count < R) return sized<R - 1>(count, group, row, turn);
    block<R>(group, row, turn);
  }

  void all_rows(int64_t group) const {
    for (int64_t b = 0; b < blocks(); ++b) {
      const int64_t row = first_row(b);
      sized(first_row(b + 1) - row, group, row, b);
    }
  }

  // Groups G at a time, of R rows; returns the first group that is left.
  template <int R, int G>
  int64_t together(int64_t group, int64_t end) const {
    for (; group + G <= end; group += G) block<R, G>(group, 0, 0);
    return group;
  }

  void groups(int64_t group, int64_t end) const {
    switch (rows) {
      case 1: group = together<1, kLanes == 16 ? 2 : 4>(group, end); break;
      case 2: group = together<2, kLanes == 16 ? 2 : 3>(group, end); break;
      case 3: group = together<3, 2>(group, end); break;
      case 4: if constexpr (kLanes == 16) group = together<4, 2>(group, end);
    }
    for (; group < end; ++group) all_rows(group);
  }
};

// A team's product of rows x [rows, inputs]; nobody waits.
template <typename T>
void product(const Team& team, const Map& map, const T* x, int64_t rows, Into into) {
  const int64_t groups = map.groups();
  if (rows > 0) Product<T>{map, x, rows, into}.groups(team.first(groups), team.last(groups));
}

}  // namespace bozzetto
