// A masked transformer (targets/mar.py) on what is known so far, as one call: an encoder of the known tokens, a decoder
// of the whole grid, blocks of which every place sees every other. A pass multiplies far more than it reads, so that a
// thread takes rows, and all maps of a block on few rows at a time; threads meet before and after attention only.
#pragma once
#include "attend.h"
#include "linear.h"

namespace bozzetto {

struct Affine {
  const float *gain, *bias;  // of a layer norm
};

struct Block {
  Map qkv, proj, fc1, fc2;
  Affine norm_1, norm_2;
};

struct Masked {
  int64_t half, dim, heads, depth, buffer, length, token_dim;  // half: bfloat16 and not float32; depth: of either stack
  Map embedding, bridge;
  const Block *encoder, *decoder;
  Affine input_norm, encoder_norm, decoder_norm;
  // [classes + 1], [buffer + length] twice, the same with the mask token, [length]; each [dim]
  const float *classes, *encoder_places, *decoder_places, *blank, *condition_places;
};

struct Given {
  int64_t threads, batch, copies, known, places;
  const int64_t *labels, *given, *wanted;  // [copies B], [B, K], [B, W]
  const float* tokens;                     // [B, length, token_dim]
  void* out;                               // [copies B, W, dim]
};

constexpr int64_t kTile = 72;  // rows that go through a block's maps together

template <typename To>
void layer_norm(const float* from, int64_t dim, Affine norm, To* to) {
  const float count = static_cast<float>(dim);
  Floats sum{}, square{};
  for (int64_t d = 0; d < dim; d += kLanes) sum += some(from + d, dim - d);
  const float mean = summed(sum) / count;
  for (int64_t d = 0; d < dim; d += kLanes) {
    Floats v = some(from + d, dim - d) - mean;
    for (int64_t j = dim - d; j < kLanes; ++j) v[j] = 0;
    square += v * v;
  }
  const float by = 1.0f / std::sqrt(summed(square) / count + 1e-6f);
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t left = dim - d;
    put((some(from + d, left) - mean) * by * some(norm.gain + d, left) + some(norm.bias + d, left), to + d, left);
  }
}

template <typename T>
struct MaskedPass {
  const Masked& n;
  const Given& p;
  Head head;
  int64_t rows, seen, all, units, parts;  // sequences; places of the encoder and of the decoder; units of attention
  std::vector<float> x, grid, last;
  std::vector<T> qkv, mixed;
  std::vector<uint8_t> sight;

  MaskedPass(const Masked& n, const Given& p)
      : n(n),
        p(p),
        head{n.dim / n.heads, (n.dim / n.heads + kLanes - 1) / kLanes * kLanes, (n.buffer + n.length + 63) / 64 * 64},
        rows(p.batch * p.copies),
        seen(n.buffer + p.known),
        all(n.buffer + n.length),
        parts((p.threads + rows * n.heads - 1) / (rows * n.heads)) {
    units = rows * n.heads * parts;
    x.resize(rows * seen * n.dim), grid.resize(rows * all * n.dim), last.resize(rows * p.places * n.dim);
    qkv.resize(rows * all * 3 * n.dim), mixed.resize(rows * all * n.dim);
  }

  int64_t slot(int64_t r, int64_t i) const {
    return i < n.buffer ? i : n.buffer + p.given[r % p.batch * p.known + i - n.buffer];
  }

  // What a thread holds of the rows it works on.
  struct Room {
    std::vector<T> normed, act, keys, values, q;
    std::vector<float> wide;
    std::vector<const T*> at;
    std::vector<const uint8_t*> sight;
    std::vector<T*> out;
    Scratch scratch;
  };

  // The thread's share of `count` rows, some at a time.
  template <typename Work>
  void tiles(const Team& team, int64_t count, Work work) const {
    for (int64_t r = team.first(count), end = team.last(count); r < end; r += kTile) work(r, std::min(kTile, end - r));
  }

  void multiply_rows(const Map& map, const T* from, int64_t count, void* to, decltype(Into::how) how) const {
    product<T>(Team{0, 1, nullptr}, map, from, count, {to, how});
  }

  // Embedded tokens and classes at their places, under the first norm.
  void enter(const Team& team, Room& room) {
    room.normed.assign(n.embedding.inputs, T{}), room.wide.resize(n.dim);
    for (int64_t i = team.first(rows * seen); i < team.last(rows * seen); ++i) {
      const int64_t r = i / seen, at = slot(r, i % seen);
      const float* from = n.classes + p.labels[r] * n.dim;
      if (i % seen >= n.buffer) {
        const float* token = p.tokens + (r % p.batch * n.length + at - n.buffer) * n.token_dim;
        for (int64_t d = 0; d < n.token_dim; ++d) assign(room.normed[d], token[d]);
        multiply_rows(n.embedding, room.normed.data(), 1, room.wide.data(), Into::kFloat);
        from = room.wide.data();
      }
      float* to = x.data() + i * n.dim;
      for (int64_t d = 0; d < n.dim; ++d) to[d] = from[d] + n.encoder_places[at * n.dim + d];
      layer_norm(to, n.dim, n.input_norm, to);
    }
    for (int64_t r = team.first(rows); r < team.last(rows); ++r) std::copy_n(n.blank, all * n.dim, grid.data() + r * all * n.dim);
  }

  // From the encoder to the decoder.
  void cross(const Team& team, Room& room) {
    room.normed.resize(kTile * n.dim), room.wide.resize(kTile * n.dim);
    tiles(team, rows * seen, [&](int64_t first, int64_t count) {
      for (int64_t i = 0; i < count; ++i)
        layer_norm(x.data() + (first + i) * n.dim, n.dim, n.encoder_norm, room.normed.data() + i * n.dim);
      multiply_rows(n.bridge, room.normed.data(), count, room.wide.data(), Into::kFloat);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t r = (first + i) / seen, at = slot(r, (first + i) % seen);
        float* to = grid.data() + (r * all + at) * n.dim;
        for (int64_t d = 0; d < n.dim; ++d) to[d] = room.wide[i * n.dim + d] + n.decoder_places[at * n.dim + d];
      }
    });
  }

  void project(const Block& b, const float* from, int64_t first, int64_t count, Room& room) {
    room.normed.resize(kTile * n.dim);
    for (int64_t i = 0; i < count; ++i)
      layer_norm(from + (first + i) * n.dim, n.dim, b.norm_1, room.normed.data() + i * n.dim);
    multiply_rows(b.qkv, room.normed.data(), count, qkv.data() + first * 3 * n.dim, Into::kPlain);
  }

  // A part of the queries of a sequence and a head; `wanted`: only those of the wanted places.
  void attention(int64_t unit, int64_t places, bool wanted, Room& room) {
    const int64_t r = unit / parts / n.heads, h = unit / parts % n.heads, count = wanted ? p.places : places;
    const int64_t begin = count * (unit % parts) / parts, end = count * (unit % parts + 1) / parts;
    const int64_t columns = (places + 63) / 64 * 64;
    if (begin == end) return;
    room.keys.assign(head.numbers(), T{}), room.values.assign(head.numbers(), T{});
    room.q.assign((end - begin + 1) * head.wide, T{});
    room.at.resize(end - begin), room.sight.assign(end - begin, sight.data()), room.out.resize(end - begin);
    T* one = room.q.data() + (end - begin) * head.wide;
    const auto part = [&](int64_t i, int64_t which) { return qkv.data() + ((r * places + i) * 3 + which) * n.dim + h * head.dim; };
    for (int64_t i = 0; i < places; ++i) {
      std::copy_n(part(i, 1), head.dim, one);
      put_key(room.keys.data(), head, i, one);
      std::copy_n(part(i, 2), head.dim, one);
      put_value(room.values.data(), head, i, one);
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = wanted ? n.buffer + p.wanted[r % p.batch * p.places + i] : i;
      room.at[i - begin] = std::copy_n(part(at, 0), head.dim, room.q.data() + (i - begin) * head.wide) - head.dim;
      room.out[i - begin] = mixed.data() + (r * count + i) * n.dim + h * head.dim;
    }
    attend_all<T>(room.scratch, room.keys.data(), room.values.data(), room.at.data(), room.sight.data(), end - begin, head,
                  columns, room.out.data(), nullptr);
  }

  // A block behind its attention.
  void feed(const Block& b, float* to, int64_t first, int64_t count, Room& room) {
    room.normed.resize(kTile * n.dim), room.act.resize(kTile * b.fc1.columns);
    to += first * n.dim;
    multiply_rows(b.proj, mixed.data() + first * n.dim, count, to, Into::kAdded);
    for (int64_t i = 0; i < count; ++i) layer_norm(to + i * n.dim, n.dim, b.norm_2, room.normed.data() + i * n.dim);
    multiply_rows(b.fc1, room.normed.data(), count, room.act.data(), Into::kGelu);
    multiply_rows(b.fc2, room.act.data(), count, to, Into::kAdded);
  }

  // A stack over `places` places of every sequence; `narrow`: the last block gives the wanted places only, in `last`.
  void stack(const Team& team, const Block* blocks, std::vector<float>& at, int64_t places, bool narrow, Room& room) {
    if (team.id == 0) {
      sight.assign(head.slots, 0);
      std::fill_n(sight.begin(), places, uint8_t{1});
    }
    tiles(team, rows * places, [&](int64_t first, int64_t count) { project(blocks[0], at.data(), first, count, room); });
    team.meet();
    for (int64_t i = 0; i < n.depth; ++i) {
      const bool wanted = narrow && i + 1 == n.depth;
      for (int64_t u = team.first(units); u < team.last(units); ++u) attention(u, places, wanted, room);
      if (wanted)
        for (int64_t j = team.first(rows * p.places); j < team.last(rows * p.places); ++j) {
          const int64_t r = j / p.places, from = n.buffer + p.wanted[r % p.batch * p.places + j % p.places];
          std::copy_n(at.data() + (r * places + from) * n.dim, n.dim, last.data() + j * n.dim);
        }
      team.meet();
      std::vector<float>& to = wanted ? last : at;
      tiles(team, wanted ? rows * p.places : rows * places, [&](int64_t first, int64_t count) {
        feed(blocks[i], to.data(), first, count, room);
        if (i + 1 < n.depth) project(blocks[i + 1], to.data(), first, count, room);
      });
      team.meet();
    }
  }

  void run(const Team& team) {
    static thread_local Room room;
    enter(team, room);
    team.meet();
    stack(team, n.encoder, x, seen, false, room);
    cross(team, room);
    team.meet();
    stack(team, n.decoder, grid, all, true, room);
    T* out = static_cast<T*>(p.out);
    for (int64_t j = team.first(rows * p.places); j < team.last(rows * p.places); ++j) {
      const float* place = n.condition_places + p.wanted[j / p.places % p.batch * p.places + j % p.places] * n.dim;
      float* from = last.data() + j * n.dim;
      layer_norm(from, n.dim, n.decoder_norm, from);
      for (int64_t d = 0; d < n.dim; ++d) assign(out[j * n.dim + d], from[d] + place[d]);
    }
  }
};

template <typename T>
void run_masked(const Masked& n, const Given& p) {
  MaskedPass<T> pass(n, p);
  together(p.threads, [&](const Team& team) { pass.run(team); });
}

}  // namespace bozzetto
