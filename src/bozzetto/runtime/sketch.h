// Drafting level by level with a draft model of codes (drafters/tree.py) as one call. Of EAGLE what the last pass
// committed is taken in, then every level's pairs go through the layers and the target's head; of a parallel drafter the
// logits of all places are given, and a table tells what the token before adds. The next level is drawn from these laws
// (a static tree), or their likeliest children are taken (a dynamic one).
#pragma once
#include <memory>

#include "laws.h"
#include "pass.h"

namespace bozzetto {

struct Sketch {
  const Network* network;
  const Pass* layers;  // the caches, and what is fixed about them
  Map fc, output;      // [embedded token; feature] -> input; feature -> logits
  const void* table;   // [V, dim], what stands for a token
  // What the last pass committed: [B, longest], [R, longest, dim], [B], [B].
  const int64_t* tokens;
  const void* features;
  const int64_t *start, *committed;
  const float* bases;  // [R, places, V], of a parallel drafter, and [V, rank], what its table reads of a token, or null
  const void* before;
  Map to_logits;  // rank -> V
  int64_t half, places;
  int64_t threads, batch, copies, longest, vocab, levels, beam, greedy;  // beam: children of a node of a
  float guidance, temperature, top_p;                                              // dynamic tree, 0: static
  int64_t top_k;
  // Levels of a tree: nodes that are fed, their most children; then, level after level, the nodes' numbers, those of
  // their parents among the fed ones (0: the root), whom they see among the fed ones, and their children (0: none).
  const int64_t *counts, *widths, *nodes, *parents;
  const uint8_t* sees;
  const int64_t* children;
  const int64_t* keys;  // [B], of the draws of a pass; or the fixed noise [B, length, V] at the places:
  const float* fixed;
  int64_t length;
  // Of a static tree: tokens [B, M + 1], laws [B, I, V]; margins [B].
  int64_t room;
  int64_t* drawn;
  float *laws, *margins;
  // Of a dynamic tree: candidates' tokens and joint log-probabilities [B, P]; the mothers of every beam of them [B, I],
  // numbers of candidates from 1 on, 0: the root.
  int64_t candidates;
  float* scores;
  int64_t* mothers;
};

// The `count` largest of x, best first; returns the smallest gap between one of them and the next (inf: there is none).
inline float largest_of(const float* x, int64_t size, int64_t count, int64_t* found) {
  static thread_local std::vector<std::pair<float, int64_t>> best;
  const int64_t kept = std::min(count + 1, size);
  best.assign(kept, {-std::numeric_limits<float>::infinity(), -1});
  for (int64_t i = 0; i < size; ++i) {
    if (x[i] <= best[kept - 1].first && best[kept - 1].second >= 0) continue;
    int64_t at = kept - 1;
    while (at > 0 && (best[at - 1].second < 0 || best[at - 1].first < x[i])) best[at] = best[at - 1], --at;
    best[at] = {x[i], i};
  }
  float gap = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < std::min(count, kept); ++i) found[i] = best[i].second;
  for (int64_t i = 0; i + 1 < kept; ++i) {
    const float apart = best[i].first - best[i + 1].first;
    if (std::isfinite(apart)) gap = std::min(gap, apart);  // not a number: both impossible
  }
  return gap;
}

template <typename T>
struct Sketching {
  const Sketch& s;
  int64_t dim, rows, fed = 0;                       // fed: nodes of all levels but the root's
  std::vector<Pass> passes;                         // one of each level, the committed pairs' first
  std::vector<std::unique_ptr<Run<T>>> runs;
  std::vector<T> pairs, inputs, grown, hidden;      // grown: [R, 1 + fed, dim], predictions
  std::vector<float> logits, noise, laws, near;
  std::vector<int64_t> first, slots, depths, chosen, parents;  // first: of each level among the fed nodes
  std::vector<uint8_t> sees;
  std::vector<float> joint;
  int64_t draws = 0, most = 1;  // laws that are drawn from; nodes of the widest level

  explicit Sketching(const Sketch& s)
      : s(s), dim(s.bases == nullptr ? s.network->dim : s.to_logits.inputs), rows(s.batch * s.copies) {
    for (int64_t d = 0; d < s.levels; ++d) {
      first.push_back(fed);
      if (d > 0) fed += s.counts[d];
      draws += s.counts[d];
      most = std::max(most, s.counts[d]);
    }
    const int64_t widest = std::max(most, s.longest);
    pairs.resize(rows * widest * 2 * dim), inputs.resize(rows * widest * dim), hidden.resize(rows * widest * dim);
    grown.resize(rows * (1 + fed) * dim);
    logits.resize(rows * most * s.vocab);
    if (s.bases != nullptr && s.before != nullptr) added.resize(s.batch * most * s.vocab);
    near.assign(s.batch * most, std::numeric_limits<float>::infinity());
    if (!s.greedy && s.fixed == nullptr && !s.beam) noise.resize(s.batch * draws * s.vocab);
    if (s.beam) laws.resize(s.batch * most * s.vocab), joint.resize(s.batch * most), chosen.resize(s.batch * most);
    if (s.bases == nullptr) prepare_passes();
    parents.resize(s.batch * most);
  }

  void prepare_passes() {
    passes.reserve(s.levels);
    slots.resize(fed), depths.resize(fed);
    if (s.beam) sees.resize(s.batch * fed * fed);
    const uint8_t* seen = s.sees;
    for (int64_t d = 0; d < s.levels; ++d) {
      Pass& pass = passes.emplace_back(*s.layers);
      pass.threads = s.threads, pass.batch = s.batch, pass.copies = s.copies;
      pass.tokens = nullptr, pass.condition = nullptr, pass.given_seen = nullptr;
      pass.x = inputs.data(), pass.x_rows = rows, pass.hidden = hidden.data();
      pass.width = d ? s.counts[d] : s.longest, pass.start = d ? following() : s.start;
      int64_t furthest = 0;
      for (int64_t b = 0; b < s.batch; ++b) furthest = std::max(furthest, pass.start[b]);
      const int64_t span = d ? first[d] + s.counts[d] : s.longest;
      pass.reach = std::min(pass.slots, pass.lead + furthest + span);
      pass.layout_slot = pass.depth = nullptr, pass.sees = nullptr;
      if (d) {
        for (int64_t i = 0; i < s.counts[d]; ++i) slots[first[d] + i] = first[d] + i, depths[first[d] + i] = d - 1;
        pass.layout_slot = slots.data() + first[d], pass.depth = depths.data() + first[d];
        pass.span = span, pass.sees = seen;
        pass.layouts = 1;
        if (!s.beam) seen += s.counts[d] * span;
      }
      runs.push_back(nullptr);
      if (!s.beam || d == 0) runs[d] = std::make_unique<Run<T>>(*s.network, pass);
    }
  }

  std::vector<int64_t> next;
  const int64_t* following() {  // where drafted pairs go
    if (next.empty())
      for (int64_t b = 0; b < s.batch; ++b) next.push_back(s.start[b] + s.committed[b]);
    return next.data();
  }

  LawOf settings() const { return {s.guidance, s.temperature, s.top_p, s.top_k}; }

  void make_noise(const Team& team) {
    const int64_t count = s.batch * draws;
    if (noise.empty()) return;
    for (int64_t i = team.first(count); i < team.last(count); ++i)
      gumbel_row(folded<uint64_t>(s.keys[i / draws], i % draws), s.vocab, noise.data() + i * s.vocab);
  }

  // Pairs of a level's nodes, or of the committed tokens.
  void pair(int64_t d, int64_t r, int64_t i) {
    const int64_t b = r % s.batch, width = passes[d].width;
    T* to = pairs.data() + (r * width + i) * 2 * dim;
    const int64_t token = d ? token_of(d, b, i) : s.tokens[b * s.longest + i];
    std::copy_n(static_cast<const T*>(s.table) + token * dim, dim, to);
    const T* feature = d ? grown.data() + (r * (1 + fed) + parent_of(d, b, i)) * dim
                         : static_cast<const T*>(s.features) + (r * s.longest + i) * dim;
    std::copy_n(feature, dim, to + dim);
  }

  int64_t node_at(int64_t d, int64_t i) const { return first[d] + i + (d > 0); }  // in `nodes`, the root first
  int64_t token_of(int64_t d, int64_t b, int64_t i) const {
    return s.beam ? s.drawn[b * s.candidates + chosen[b * most + i] - 1] : s.drawn[b * s.room + s.nodes[node_at(d, i)]];
  }
  int64_t parent_of(int64_t d, int64_t b, int64_t i) const {
    return s.beam ? parents[b * most + i] : s.parents[node_at(d, i)];
  }

  // Through the layers; what they predict goes to `grown`, and to the front of `hidden` where it is read out.
  void feed(const Team& team, int64_t d) {
    const int64_t width = passes[d].width, count = rows * width;
    for (int64_t i = team.first(count); i < team.last(count); ++i) pair(d, i / width, i % width);
    team.meet();
    product(team, s.fc, pairs.data(), count, {inputs.data(), Into::kPlain});
    team.meet();
    runs[d]->run(team);
    team.meet();
    for (int64_t r = team.first(rows); r < team.last(rows); ++r) {
      const int64_t from = d ? r * width : r * width + s.committed[r % s.batch] - 1;
      std::copy_n(hidden.data() + from * dim, (d ? width : 1) * dim,
                  grown.data() + (r * (1 + fed) + (d ? 1 + first[d] : 0)) * dim);
    }
    if (d == 0) team.meet();
    if (d == 0 && team.id == 0)
      for (int64_t r = 0; r < rows; ++r) std::copy_n(grown.data() + r * (1 + fed) * dim, dim, pairs.data() + r * dim);
    if (d == 0) team.meet();
    product(team, s.output, d ? hidden.data() : pairs.data(), rows * s.counts[d], {logits.data(), Into::kFloat});
    team.meet();
  }

  // What the table adds behind a level's nodes, [B, n, V].
  void look_up(const Team& team, int64_t d) {
    const int64_t n = s.counts[d], count = s.batch * n;
    for (int64_t u = team.first(count); u < team.last(count); ++u) {
      const int64_t b = u / n, last = s.tokens[b * s.longest + s.committed[b] - 1];
      const T* from = static_cast<const T*>(s.before) + (d ? token_of(d, b, u % n) : last) * dim;
      std::copy_n(from, dim, pairs.data() + u * dim);
    }
    team.meet();
    product(team, s.to_logits, pairs.data(), count, {added.data(), Into::kFloat});
    team.meet();
  }
  std::vector<float> added;

  void law_of_place(int64_t d, int64_t b, int64_t i) {
    static thread_local std::vector<float> both;
    both.resize(2 * s.vocab);
    const float* more = s.before == nullptr ? nullptr : added.data() + (b * s.counts[d] + i) * s.vocab;
    for (int64_t copy = 0; copy < s.copies; ++copy) {
      const float* base = s.bases + ((copy * s.batch + b) * s.places + std::min(d, s.places - 1)) * s.vocab;
      for (int64_t v = 0; v < s.vocab; ++v) both[copy * s.vocab + v] = base[v] + (more == nullptr ? 0 : more[v]);
    }
    law(both.data(), s.copies > 1 ? both.data() + s.vocab : nullptr, s.vocab, settings(), law_at(d, b, i));
  }

  float* law_at(int64_t d, int64_t b, int64_t i) {
    return s.beam ? laws.data() + (b * most + i) * s.vocab : s.laws + (b * draws + first[d] + (d > 0) + i) * s.vocab;
  }

  void law_of(int64_t d, int64_t b, int64_t i) {
    if (s.bases != nullptr) return law_of_place(d, b, i);
    const int64_t at = (b * s.counts[d] + i) * s.vocab;
    const float* uncond = s.copies > 1 ? logits.data() + s.batch * s.counts[d] * s.vocab + at : nullptr;
    law(logits.data() + at, uncond, s.vocab, settings(), law_at(d, b, i));
  }

  void ask(const Team& team, int64_t d) {
    if (s.bases == nullptr)
      feed(team, d);
    else if (s.before != nullptr)
      look_up(team, d);
  }

  // Children drawn without replacement, in the order of their draws.
  void draw_children(int64_t d, int64_t b, int64_t i, const int64_t* children) {
    static thread_local std::vector<float> scores;
    static thread_local std::vector<int64_t> found;
    const float *law = law_at(d, b, i), *with = nullptr;
    if (!s.greedy) {
      const int64_t position = std::min(following()[b] + d, s.length - 1);
      with = s.fixed != nullptr ? s.fixed + (b * s.length + position) * s.vocab
                                : noise.data() + (b * draws + first[d] + (d > 0) + i) * s.vocab;
      scores.resize(s.vocab);
      for (int64_t v = 0; v < s.vocab; ++v) scores[v] = law[v] + with[v];
    }
    found.resize(s.widths[d]);
    near[b * most + i] = largest_of(with == nullptr ? law : scores.data(), s.vocab, s.widths[d], found.data());
    for (int64_t c = 0; c < s.widths[d]; ++c) {
      const int64_t kid = children[i * s.widths[d] + c];
      if (kid > 0) s.drawn[b * s.room + kid] = found[c];
    }
  }

  void keep_margins(int64_t d) {
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t i = 0; i < s.counts[d]; ++i) s.margins[b] = std::min(s.margins[b], near[b * most + i]);
  }

  void grow_static(const Team& team) {
    const int64_t* children = s.children;
    for (int64_t d = 0; d < s.levels; ++d) {
      ask(team, d);
      const int64_t n = s.counts[d];
      for (int64_t u = team.first(s.batch * n); u < team.last(s.batch * n); ++u) {
        law_of(d, u / n, u % n);
        draw_children(d, u / n, u % n, children);
      }
      team.meet();
      if (team.id == 0) keep_margins(d);
      children += n * s.widths[d];
    }
  }

  // The likeliest children of every node, then the likeliest of these, whose children are asked for next.
  void grow_dynamic(const Team& team) {
    int64_t before = 0, asked = 0;  // candidates; nodes whose children they are
    for (int64_t d = 0; d < s.levels; ++d) {
      ask(team, d);
      const int64_t n = s.counts[d];
      for (int64_t u = team.first(s.batch * n); u < team.last(s.batch * n); ++u) {
        const int64_t b = u / n, i = u % n, at = b * s.candidates + before + i * s.beam;
        law_of(d, b, i);
        near[b * most + i] = largest_of(law_at(d, b, i), s.vocab, s.beam, s.drawn + at);
        for (int64_t c = 0; c < s.beam; ++c)
          s.scores[at + c] = (d ? joint[b * most + i] : 0.0f) + law_at(d, b, i)[s.drawn[at + c]];
        s.mothers[b * draws + asked + i] = d ? chosen[b * most + i] : 0;
      }
      team.meet();
      if (team.id == 0) {
        keep_margins(d);
        if (d + 1 < s.levels) expand(d, before);
      }
      team.meet();
      before += n * s.beam, asked += n;
    }
  }

  void expand(int64_t d, int64_t before) {
    const int64_t n = s.counts[d + 1], at = first[d + 1], span = at + n;
    std::vector<int64_t> found(n);
    std::vector<uint8_t> seen(s.batch * n * span);
    for (int64_t b = 0; b < s.batch; ++b) {
      const float* level = s.scores + b * s.candidates + before;
      s.margins[b] = std::min(s.margins[b], largest_of(level, s.counts[d] * s.beam, n, found.data()));
      for (int64_t i = 0; i < n; ++i) {
        const int64_t mother = found[i] / s.beam, number = d ? first[d] + 1 + mother : 0;  // among the fed ones
        joint[b * most + i] = level[found[i]];
        chosen[b * most + i] = before + found[i] + 1;
        parents[b * most + i] = number;
        uint8_t *own = sees.data() + (b * fed + at + i) * fed, *told = seen.data() + (b * n + i) * span;
        if (s.bases != nullptr) continue;
        if (number > 0) std::copy_n(sees.data() + (b * fed + number - 1) * fed, fed, own);
        own[at + i] = 1;
        std::copy_n(own, span, told);
      }
    }
    if (s.bases != nullptr) return;
    shown.push_back(std::move(seen));
    wide.emplace_back(s.batch * n), deep.emplace_back(s.batch * n);
    for (int64_t i = 0; i < s.batch * n; ++i) wide.back()[i] = at + i % n, deep.back()[i] = d;
    Pass& pass = passes[d + 1];
    pass.sees = shown.back().data(), pass.layouts = s.batch;
    pass.layout_slot = wide.back().data(), pass.depth = deep.back().data();
    runs[d + 1] = std::make_unique<Run<T>>(*s.network, pass);
  }
  std::vector<std::vector<uint8_t>> shown;  // what nodes of the levels see
  std::vector<std::vector<int64_t>> wide, deep;

  void run(const Team& team) {
    make_noise(team);
    if (s.beam)
      grow_dynamic(team);
    else
      grow_static(team);
  }
};

template <typename T>
void sketch(const Sketch& s) {
  Sketching<T> sketching(s);
  sketching.following();
  std::fill_n(s.margins, s.batch, std::numeric_limits<float>::infinity());
  together(s.threads, [&](const Team& team) { sketching.run(team); });
}

}  // namespace bozzetto
