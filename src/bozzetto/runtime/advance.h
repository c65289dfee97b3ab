// What follows a pass of a window (decoding/advance.py): laws, verdict, commit and the next inputs, for slots of images.
// Two rules: keep what sequential decoding of the same noise would have drawn (rules/seed_exact.py), or couple every
// place with its draft (rules/exact.py).
#pragma once
#include "laws.h"

namespace bozzetto {

struct Slots {
  int64_t coupled;  // whether places are coupled with their drafts
  int64_t threads, batch, copies, width, widest, vocab, length, ring, room;  // room: columns of `tokens`
  const float* logits;                               // [copies B, W, V]
  const float *guidance, *temperature, *noise;       // [B], [B], [B, ring, V]
  const int64_t *inputs, *count, *drafted;           // [B, W], [B], [B]
  int64_t *tokens, *next, *next_count;               // [B, room], [B, widest], [B]
  float* report;                                     // [3, B]: committed, accepted, margin
  const int64_t *keys, *passes;                      // of coupled places: [B] of the coins, [B],
  const float* drafts;                               // [B, W - 1, V], their laws,
  float* next_laws;                                  // [B, widest - 1, V]
  float* laws;                                       // [B, W, V], of the places
};

struct Advancing {
  const Slots& s;
  std::vector<float> margins;
  std::vector<int64_t> drawn;
  std::vector<uint8_t> kept;

  explicit Advancing(const Slots& s) : s(s) {
    margins.resize(s.batch * s.width);
    drawn.resize(s.batch * s.width);
    kept.resize(s.batch * s.width);
  }

  const float* noise(int64_t b, int64_t position) const { return s.noise + (b * s.ring + position % s.ring) * s.vocab; }

  void draw_place(int64_t at) {
    const int64_t b = at / s.width, w = at % s.width, rows = s.batch * s.width;
    const float *cond = s.logits + at * s.vocab, *uncond = s.copies > 1 ? s.logits + (rows + at) * s.vocab : nullptr;
    float* row = s.laws + at * s.vocab;
    law(cond, uncond, s.vocab, {s.guidance[b], s.temperature[b], 1.0f, 0}, row);
    if (s.coupled) return couple_place(b, w, row);
    drawn[at] = draw(row, noise(b, s.count[b] + w), s.vocab, margins.data() + at);
  }

  void couple_place(int64_t b, int64_t w, const float* log_p) {
    const int64_t at = b * s.width + w;
    if (w == s.width - 1 || s.drafted[b] == 0) {  // no draft, or what only fills up
      drawn[at] = draw(log_p, noise(b, s.count[b] + w), s.vocab, margins.data() + at);
      kept[at] = 0;
      return;
    }
    const float* log_q = s.drafts + (b * (s.width - 1) + w) * s.vocab;
    const uint64_t key = folded<uint64_t>(folded<uint64_t>(s.keys[b], s.passes[b]), s.count[b] + w);
    const double coin = uniform(folded<uint64_t>(key, 0)), other = uniform(folded<uint64_t>(key, 1));
    const Coupling found = coupled(log_p, log_q, s.inputs[at + 1], s.vocab, coin, other);
    drawn[at] = found.token, kept[at] = found.kept, margins[at] = found.margin;
  }

  void commit(int64_t b) {
    const int64_t *mine = drawn.data() + b * s.width, most = std::min(s.drafted[b], s.width - 1);
    int64_t accepted = 0;
    while (accepted < most && (s.coupled ? kept[b * s.width + accepted]
                                         : mine[accepted] == s.inputs[b * s.width + accepted + 1]))
      ++accepted;
    const int64_t left = s.length - s.count[b], committed = std::min(accepted + 1, left);
    std::copy_n(mine, s.width, s.tokens + b * s.room + s.count[b]);
    float margin = std::numeric_limits<float>::infinity();
    // Coupled places go on as drafts, with what they were drawn from; others are drawn again in the next pass.
    const int64_t read = !s.coupled ? committed : s.drafted[b] == 0 ? 1 : s.width;
    for (int64_t w = 0; w < std::min(read, left); ++w) margin = std::min(margin, margins[b * s.width + w]);
    for (int64_t j = 0; j < s.widest; ++j) {
      const int64_t column = std::max<int64_t>(committed - 1, 0) + j, from = b * s.width + std::min(column, most);
      const float* law = s.laws + from * s.vocab;
      float near = std::numeric_limits<float>::infinity();
      int64_t& next = s.next[b * s.widest + j];
      next = column <= most ? mine[column] : draw(law, noise(b, s.count[b] + column), s.vocab, &near);
      if (!s.coupled) continue;
      if (s.count[b] + column < s.length) margin = std::min(margin, near);
      if (j > 0) std::copy_n(law, s.vocab, s.next_laws + (b * (s.widest - 1) + j - 1) * s.vocab);
    }
    s.next_count[b] = s.count[b] + committed;
    s.report[b] = static_cast<float>(committed);
    s.report[s.batch + b] = static_cast<float>(std::min(accepted, left));
    s.report[2 * s.batch + b] = margin;
  }

  void run(const Team& team) {
    const int64_t places = s.batch * s.width;
    for (int64_t at = team.first(places); at < team.last(places); ++at) draw_place(at);
    team.meet();
    for (int64_t b = team.first(s.batch); b < team.last(s.batch); ++b) commit(b);
  }
};

}  // namespace bozzetto
