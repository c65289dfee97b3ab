// A pass of a cached decoder - the transformer of a target, or of a drafter - as one call that knows no shape: any
// number of sequences, places and cache columns, chains and trees.
#pragma once
#include "attend.h"
#include "linear.h"

namespace bozzetto {

struct Layer {
  Map qkv, out, gate_up, down;
  const float *gain_1, *gain_2;        // of the norms, [dim]; gain_1 null: none before the attention
  const float *head_gain, *head_bias;  // of layer norms of heads [heads + kv_heads][head_dim], or null
};

struct Network {
  int64_t half, dim, heads, kv_heads, head_dim, count;  // half: bfloat16 and not float32; count: layers
  float eps, head_eps;
  const Layer* layers;
  const float* gain;  // of the last norm, or null
};

struct Pass {
  int64_t threads, batch, copies, width, reach, slots, lead;
  const int64_t* start;                 // [B]
  const int64_t *layout_slot, *depth;   // [B or 1, W], or null: a chain
  const uint8_t* sees;                  // [B or 1, W, span]
  int64_t span, layouts;                // layouts: B or 1
  const uint8_t* open;                  // [B, slots], which columns may be seen at all, or null
  const uint8_t* given_seen;            // [B, W, reach] in place of all that, or null
  const int64_t* tokens;                // [B, W] of `table`, or null: x is given
  const void *table, *condition;        // [V, dim]; [R, dim] for inputs at position 0, or null
  const void* x;                        // [x_rows, W, dim]
  int64_t x_rows;
  const float* rotation;                // [rows, head_dim / 2, 2]
  const int64_t* shift;                 // [B] or null: the row of position p is p + shift,
  int64_t furthest;                     // from 0 to furthest
  void* const* caches;                  // keys and values of every layer in turn, [R][kv_heads][slots wide]
  void* hidden;                         // [R, W, dim]
  int64_t probed;                       // the layer whose attention's entropy is wanted, below 0: none
  float* entropy;                       // [R, W]
};

template <typename T>
struct Run {
  const Network& n;
  const Pass& p;
  Head head;
  int64_t rows, places, columns;  // sequences; rows of a product; columns looked at, filled up
  std::vector<float> x, shares;
  std::vector<T> normed, qkv, mixed, act;
  std::vector<uint8_t> seen;  // [B, W, columns]
  std::vector<int64_t> slot, turn;

  Run(const Network& n, const Pass& p)
      : n(n),
        p(p),
        head{n.head_dim, (n.head_dim + kLanes - 1) / kLanes * kLanes, p.slots},
        rows(p.batch * p.copies),
        places(rows * p.width),
        columns(std::min((p.reach + 63) / 64 * 64, p.slots)) {
    x.resize(places * n.dim);
    normed.resize(places * n.dim);
    qkv.resize(places * (n.heads + 2 * n.kv_heads) * n.head_dim);
    mixed.resize(places * n.heads * n.head_dim);
    int64_t most = 0;
    for (int64_t i = 0; i < n.count; ++i) most = std::max(most, n.layers[i].down.inputs);
    act.resize(places * most);
    seen.resize(p.batch * p.width * columns);
    slot.resize(p.batch * p.width);
    turn.resize(p.batch * p.width);
    if (p.probed >= 0) shares.resize(places * columns * n.kv_heads);
  }

  void prepare(int64_t b, int64_t w) {
    const int64_t row = p.layouts == 1 ? w : b * p.width + w, at = b * p.width + w;
    const int64_t position = p.start[b] + (p.depth == nullptr ? w : p.depth[row]);
    const int64_t first = p.start[b] + p.lead;  // the column of the first input
    slot[at] = first + (p.layout_slot == nullptr ? w : p.layout_slot[row]);
    turn[at] = std::clamp<int64_t>(position + (p.shift == nullptr ? 0 : p.shift[b]), 0, p.furthest);
    uint8_t* out = seen.data() + at * columns;
    for (int64_t c = 0; c < columns; ++c) {
      if (p.given_seen != nullptr)
        out[c] = c < p.reach && p.given_seen[at * p.reach + c];
      else if (c < first)
        out[c] = p.open == nullptr || p.open[b * p.slots + c];
      else if (p.sees == nullptr)
        out[c] = c <= slot[at] && (p.open == nullptr || p.open[b * p.slots + c]);
      else
        out[c] = c - first < p.span && p.sees[row * p.span + c - first];
    }
    // An input sees itself, even where a caption is empty; a slot without an image may have run ahead of the columns.
    if (slot[at] < columns) out[slot[at]] = 1;
    for (int64_t copy = 0; copy < p.copies; ++copy) {
      const int64_t r = copy * p.batch + b;
      const T* from;
      if (position == 0 && p.condition != nullptr)
        from = static_cast<const T*>(p.condition) + r * n.dim;
      else if (p.tokens != nullptr)
        from = static_cast<const T*>(p.table) + p.tokens[at] * n.dim;
      else
        from = static_cast<const T*>(p.x) + (r % p.x_rows * p.width + w) * n.dim;
      float* to = x.data() + (r * p.width + w) * n.dim;
      for (int64_t d = 0; d < n.dim; ++d) to[d] = number(from[d]);
    }
  }

  // Rows of x under a norm, or as they are, in T.
  void norm(const Team& team, const float* gain, T* to) const {
    for (int64_t i = team.first(places); i < team.last(places); ++i) {
      const float* from = x.data() + i * n.dim;
      Floats sum{};
      for (int64_t d = 0; d < n.dim; d += kLanes) {
        const Floats v = some(from + d, n.dim - d);
        sum += v * v;
      }
      const float by = 1.0f / std::sqrt(summed(sum) / static_cast<float>(n.dim) + n.eps);
      for (int64_t d = 0; d < n.dim; d += kLanes) {
        const Floats v = some(from + d, n.dim - d);
        put(gain == nullptr ? v : v * by * some(gain + d, n.dim - d), to + i * n.dim + d, n.dim - d);
      }
    }
  }

  // A query or key of number `which` among the heads, normed and turned, filled up with zeros.
  void turned(const Layer& layer, const T* from, int64_t which, int64_t place, T* to) const {
    float held[1024];
    const int64_t dim = n.head_dim, half = dim / 2;
    for (int64_t d = 0; d < dim; ++d) held[d] = number(from[d]);
    if (layer.head_gain != nullptr) {
      float mean = 0, square = 0;
      for (int64_t d = 0; d < dim; ++d) mean += held[d];
      mean /= static_cast<float>(dim);
      for (int64_t d = 0; d < dim; ++d) square += (held[d] - mean) * (held[d] - mean);
      const float by = 1.0f / std::sqrt(square / static_cast<float>(dim) + n.head_eps);
      for (int64_t d = 0; d < dim; ++d)
        held[d] = (held[d] - mean) * by * layer.head_gain[which * dim + d] + layer.head_bias[which * dim + d];
    }
    const float* rotation = p.rotation + turn[place] * dim;
    for (int64_t d = 0; d < half; ++d) {
      const float cos = rotation[2 * d], sin = rotation[2 * d + 1];
      assign(to[d], held[d] * cos - held[half + d] * sin);
      assign(to[half + d], held[half + d] * cos + held[d] * sin);
    }
    for (int64_t d = dim; d < head.wide; ++d) assign(to[d], 0.0f);
  }

  // Attention of one sequence and one head of keys, with the heads of queries that share it.
  void attention(const Layer& layer, int64_t r, int64_t kv, T* keys, T* values, bool probed, Scratch& room) {
    const int64_t group = n.heads / n.kv_heads, b = r % p.batch, count = group * p.width;
    const int64_t step = (n.heads + 2 * n.kv_heads) * n.head_dim;
    const int64_t at = (r * n.kv_heads + kv) * head.numbers();
    static thread_local std::vector<T> turned_rows;
    static thread_local std::vector<const T*> q;
    static thread_local std::vector<const uint8_t*> sight;
    static thread_local std::vector<T*> out;
    static thread_local std::vector<float*> kept;
    turned_rows.resize((count + 1) * head.wide);
    q.resize(count), sight.resize(count), out.resize(count), kept.assign(count, nullptr);
    T* one = turned_rows.data() + count * head.wide;
    int64_t last = 0;
    for (int64_t w = 0; w < p.width; ++w) {
      const int64_t place = b * p.width + w;
      const T* from = qkv.data() + (r * p.width + w) * step;
      turned(layer, from + (n.heads + kv) * n.head_dim, n.heads + kv, place, one);
      put_key(keys + at, head, slot[place], one);
      std::fill(one, one + head.wide, T{});
      std::copy_n(from + (n.heads + n.kv_heads + kv) * n.head_dim, n.head_dim, one);
      put_value(values + at, head, slot[place], one);
      const uint8_t* shown = seen.data() + place * columns;
      int64_t c = columns;
      while (c > last && !shown[c - 1]) --c;
      last = std::max(last, c);
      for (int64_t g = 0; g < group; ++g) {
        const int64_t h = kv * group + g, number = g * p.width + w;
        turned(layer, from + h * n.head_dim, h, place, turned_rows.data() + number * head.wide);
        q[number] = turned_rows.data() + number * head.wide;
        sight[number] = shown;
        out[number] = mixed.data() + ((r * p.width + w) * n.heads + h) * n.head_dim;
        if (probed) kept[number] = shares.data() + ((r * p.width + w) * n.kv_heads + kv) * columns;
      }
    }
    const int64_t looked_at = std::min((last + 63) / 64 * 64, columns);
    attend_all<T>(room, keys + at, values + at, q.data(), sight.data(), count, head, looked_at, out.data(),
                  probed ? kept.data() : nullptr);
  }

  void measure(int64_t i) const {  // entropy of the attention with heads averaged, over its largest value
    float found = 0;
    int64_t open = 0;
    const int64_t b = i / p.width % p.batch, w = i % p.width;
    for (int64_t c = 0; c < columns; ++c) {
      float share = 0;
      for (int64_t kv = 0; kv < n.kv_heads; ++kv) share += shares[(i * n.kv_heads + kv) * columns + c];
      share /= static_cast<float>(n.heads);
      if (share > 0) found -= share * std::log(share);
      open += seen[(b * p.width + w) * columns + c];
    }
    p.entropy[i] = found / std::log(static_cast<float>(std::max<int64_t>(open, 2)));
  }

  void run(const Team& team) {
    static thread_local Scratch room;
    const int64_t inputs = p.batch * p.width;
    for (int64_t i = team.first(inputs); i < team.last(inputs); ++i) prepare(i / p.width, i % p.width);
    team.meet();
    for (int64_t number = 0; number < n.count; ++number) {
      const Layer& layer = n.layers[number];
      T *keys = static_cast<T*>(p.caches[2 * number]), *values = static_cast<T*>(p.caches[2 * number + 1]);
      norm(team, layer.gain_1, normed.data());
      team.meet();
      product(team, layer.qkv, normed.data(), places, {qkv.data(), Into::kPlain});
      team.meet();
      const int64_t units = rows * n.kv_heads;
      for (int64_t u = team.first(units); u < team.last(units); ++u)
        attention(layer, u / n.kv_heads, u % n.kv_heads, keys, values, number == p.probed, room);
      team.meet();
      product(team, layer.out, mixed.data(), places, {x.data(), Into::kAdded});
      team.meet();
      norm(team, layer.gain_2, normed.data());
      team.meet();
      product(team, layer.gate_up, normed.data(), places, {act.data(), Into::kPlain});
      team.meet();
      product(team, layer.down, act.data(), places, {x.data(), Into::kAdded});
      team.meet();
    }
    T* hidden = static_cast<T*>(p.hidden);
    norm(team, n.gain, hidden);
    if (p.probed >= 0)
      for (int64_t i = team.first(places); i < team.last(places); ++i) measure(i);
  }
};

template <typename T>
void run(const Network& n, const Pass& p) {
  Run<T> pass(n, p);
  together(p.threads, [&](const Team& team) { pass.run(team); });
}

template <typename T>
void compact(const Network& n, int64_t batch, int64_t copies, int64_t slots, int64_t lead, int64_t steps,
             const int64_t* start, const int64_t* path, void* const* caches) {
  const Head head{n.head_dim, (n.head_dim + kLanes - 1) / kLanes * kLanes, slots};
  for (int64_t part = 0; part < n.count; ++part)
    for (int64_t r = 0; r < batch * copies; ++r)
      for (int64_t kv = 0; kv < n.kv_heads; ++kv) {
        const int64_t at = (r * n.kv_heads + kv) * head.numbers(), b = r % batch, first = lead + start[b];
        T *keys = static_cast<T*>(caches[2 * part]) + at, *values = static_cast<T*>(caches[2 * part + 1]) + at;
        for (int64_t t = 1; t < steps; ++t)
          if (path[b * steps + t] != t) move_column(keys, values, head, first + path[b * steps + t], first + t);
      }
}

}  // namespace bozzetto
