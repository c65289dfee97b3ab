// The features that a glance (drafters/glance.py) predicts for the places behind a pass.
#pragma once
#include "linear.h"

namespace bozzetto {

struct Glance {
  int64_t half, dim, narrow, grid, tokens_around, features_around;
  const int64_t* around;  // distances of the tokens and of the features that a place looks at
  Map of_feature, last, around_map, gate_up, down;
  const void* of_token;                        // [V, narrow]
  const float *gain, *shift, *column, *norm;   // [K, dim] twice, [grid, dim], [dim]
};

struct Look {
  int64_t threads, batch, copies, width, places, room, token_room;  // places: wanted; rooms: of `kept` and `tokens`
  const void* hidden;                       // [copies B, W, dim] of the pass
  void* kept;                               // [B, copies, room, narrow]
  const int64_t *tokens, *count, *committed;  // [B, token_room], [B], [B]
  void* out;                                // [copies B, places, dim]
};

template <typename T>
struct Glancing {
  const Glance& g;
  const Look& k;
  int64_t rows, looked;
  std::vector<T> fresh, ends, seen, normed, act;
  std::vector<float> from_last, h;

  Glancing(const Glance& g, const Look& k)
      : g(g), k(k), rows(k.batch * k.copies), looked((1 + g.tokens_around + g.features_around) * g.narrow) {
    const int64_t places = rows * k.places;
    fresh.resize(rows * k.width * g.narrow), ends.resize(rows * g.dim), seen.resize(places * looked);
    normed.resize(places * g.dim), act.resize(places * g.down.inputs);
    from_last.resize(rows * g.dim), h.resize(places * g.dim);
  }

  int64_t last(int64_t b) const { return std::max<int64_t>(k.count[b] + k.committed[b] - 1, 0); }
  T* kept(int64_t r, int64_t at) const {
    const int64_t b = r % k.batch, copy = r / k.batch;
    return static_cast<T*>(k.kept) + ((b * k.copies + copy) * k.room + at) * g.narrow;
  }
  const T* token(int64_t b, int64_t at) const {
    return static_cast<const T*>(g.of_token) + k.tokens[b * k.token_room + at] * g.narrow;
  }

  void look(int64_t r, int64_t j) {
    const int64_t b = r % k.batch, end = last(b), number = end + 1 + j;
    T* to = seen.data() + (r * k.places + j) * looked;
    std::copy_n(token(b, end), g.narrow, to);
    for (int64_t i = 0; i < g.tokens_around + g.features_around; ++i) {
      const int64_t where = number + g.around[i];
      to += g.narrow;
      if (where < 0 || where > end)
        std::fill_n(to, g.narrow, T{});
      else
        std::copy_n(i < g.tokens_around ? token(b, where) : kept(r, where), g.narrow, to);
    }
  }

  void start(int64_t i) {  // of a place: the sum of what it looks at, and its norm
    const int64_t r = i / k.places, j = i % k.places, cell = (last(r % k.batch) + 1 + j) % g.grid;
    float* x = h.data() + i * g.dim;
    Floats sum{};
    for (int64_t d = 0; d < g.dim; d += kLanes) {
      const int64_t left = g.dim - d;
      const Floats v = some(from_last.data() + r * g.dim + d, left) * some(g.gain + j * g.dim + d, left) +
                       some(g.shift + j * g.dim + d, left) + some(g.column + cell * g.dim + d, left) + some(x + d, left);
      put(v, x + d, left);
      sum += v * v;
    }
    const float by = 1.0f / std::sqrt(summed(sum) / static_cast<float>(g.dim) + 1e-6f);
    for (int64_t d = 0; d < g.dim; d += kLanes)
      put(some(x + d, g.dim - d) * by * some(g.norm + d, g.dim - d), normed.data() + i * g.dim + d, g.dim - d);
  }

  void run(const Team& team) {
    const T* hidden = static_cast<const T*>(k.hidden);
    const int64_t places = rows * k.places;
    product(team, g.of_feature, hidden, rows * k.width, {fresh.data(), Into::kPlain});
    for (int64_t r = team.first(rows); r < team.last(rows); ++r) {
      const int64_t at = std::max<int64_t>(k.committed[r % k.batch] - 1, 0);
      std::copy_n(hidden + (r * k.width + at) * g.dim, g.dim, ends.data() + r * g.dim);
    }
    team.meet();
    for (int64_t r = team.first(rows); r < team.last(rows); ++r)
      std::copy_n(fresh.data() + r * k.width * g.narrow, k.width * g.narrow, kept(r, k.count[r % k.batch]));
    product(team, g.last, ends.data(), rows, {from_last.data(), Into::kFloat});
    team.meet();
    for (int64_t i = team.first(places); i < team.last(places); ++i) look(i / k.places, i % k.places);
    team.meet();
    product(team, g.around_map, seen.data(), places, {h.data(), Into::kFloat});
    team.meet();
    for (int64_t i = team.first(places); i < team.last(places); ++i) start(i);
    team.meet();
    product(team, g.gate_up, normed.data(), places, {act.data(), Into::kPlain});
    team.meet();
    product(team, g.down, act.data(), places, {h.data(), Into::kAdded});
    team.meet();
    T* out = static_cast<T*>(k.out);
    for (int64_t i = team.first(places); i < team.last(places); ++i)
      for (int64_t d = 0; d < g.dim; d += kLanes)
        put(some(h.data() + i * g.dim + d, g.dim - d), out + i * g.dim + d, g.dim - d);
  }
};

template <typename T>
void run_glance(const Glance& g, const Look& k) {
  Glancing<T> glancing(g, k);
  together(k.threads, [&](const Team& team) { glancing.run(team); });
}

}  // namespace bozzetto
