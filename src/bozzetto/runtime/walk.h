// Verdicts on drafted chains and trees of codes (rules/walk.py and the rules over it, rules/traversal.py): which path is
// kept, and the token after it.
#pragma once
#include "laws.h"

namespace bozzetto {

struct Judged {
  enum { kTree, kLantern, kTraversal, kAnnealed, kGrouped, kCascade } rule;
  int64_t threads, batch, nodes, levels, most, vocab, laws, trees;  // most: children of a node; trees: B or 1
  const float *law, *draft;                     // [B, M + 1, V], [B, laws, V] or null: drafts are certain
  const int64_t* tokens;                        // [B, M]
  const int64_t *child, *row, *path, *order, *depth;  // as of Tree, with `trees` rows
  const double* uniforms;                       // [B, M + 1, 2]
  const float* slack;                           // [B], or null
  const int32_t* neighbours;                    // [V, columns]
  int64_t columns, near, window;                // near: of the columns, that may lend; window: see Draft
  // Of kLantern: the most that is borrowed, or, lambda > 0, (lambda - 1) times its own; of kAnnealed and kCascade their
  // parameters; of kGrouped the group is `near`.
  float delta, lambda, nu, mu;
  const float* hidden;  // of kCascade: the drafter's states [B, M + 1, dim], or null on a chain
  int64_t dim;
  int64_t *out, *accepted, *way;                // [B, D + 1], [B], [B, D + 1]
  float *spent, *margins;                       // [B], [B, D + 1]
};

inline float margin_of(double coin, double log_chance) {
  const double gap = std::abs(std::log(coin) - log_chance);
  return std::isfinite(gap) ? static_cast<float>(gap) : std::numeric_limits<float>::infinity();
}

// x by its sum, or `otherwise` where that is zero.
inline void normalise(float* x, const float* otherwise, int64_t count) {
  const float total = sum_of(x, count);
  if (!(total > 0)) {
    if (x != otherwise) std::copy_n(otherwise, count, x);
    return;
  }
  for (int64_t i = 0; i < count; ++i) x[i] /= total;
}

inline void leave(float* q, int64_t token, int64_t count) {  // q without a token, by its sum
  q[token] = 0;
  const float total = std::max(sum_of(q, count), std::numeric_limits<float>::min());
  for (int64_t i = 0; i < count; ++i) q[i] /= total;
}

struct Walk {
  const Judged& s;
  int64_t b, columns;       // columns: levels and one
  std::vector<float> p, q, rest, plain, keep;
  double left;              // of the budget

  Walk(const Judged& s) : s(s), columns(s.levels + 1) {
    for (auto* part : {&p, &q, &rest, &plain, &keep}) part->resize(s.vocab);
  }

  const int64_t* tree_row(const int64_t* part, int64_t node, int64_t wide, int64_t nodes) const {
    return part + ((s.trees == 1 ? 0 : b) * nodes + node) * wide;
  }
  int64_t token(int64_t node) const { return s.tokens[b * s.nodes + node - 1]; }
  const float* law_at(int64_t node) const { return s.law + (b * (s.nodes + 1) + node) * s.vocab; }
  double coin(int64_t node, int64_t which) const { return s.uniforms[(b * (s.nodes + 1) + node) * 2 + which]; }
  float& margin(int64_t level) const { return s.margins[b * columns + level]; }
  const int64_t* children(int64_t node) const { return tree_row(s.child, node, s.most, s.nodes + 2); }
  const float* draft_law(int64_t node) const {
    return s.draft == nullptr ? nullptr : s.draft + (b * s.laws + *tree_row(s.row, node, 1, s.nodes + 1)) * s.vocab;
  }

  // What the exact rule goes on with after a reject of x.
  void exact_rest(bool certain, int64_t x, float* to) const {
    for (int64_t v = 0; v < s.vocab; ++v) to[v] = certain ? p[v] : std::max(p[v] - q[v], 0.0f);
    if (certain) to[x] = 0;
    normalise(to, p.data(), s.vocab);
  }

  // Chance of keeping x, what follows a reject in `rest`, and the bias that the decision costs.
  float borrow(bool certain, int64_t x, float px, float qx, float& cost) {
    const float safe = std::max(qx, std::numeric_limits<float>::min()), exact = std::min(px / safe, 1.0f);
    const int32_t* near = s.neighbours + x * s.columns;
    const double most = std::min<double>(s.lambda > 0 ? (s.lambda - 1) * px : s.delta, left);
    float sum = 0, mass = 0;
    int64_t inside = 0;
    for (; inside < s.near && sum + p[near[inside]] <= most; ++inside) mass = sum += p[near[inside]];
    const float keep = std::min((px + mass) / safe, 1.0f);
    exact_rest(certain, x, plain.data());
    for (int64_t v = 0; v < s.vocab; ++v) rest[v] = certain ? p[v] : std::max(p[v] - q[v], 0.0f);
    for (int64_t i = 0; i < inside; ++i) rest[near[i]] = 0;
    rest[x] = 0;
    normalise(rest.data(), plain.data(), s.vocab);
    const float after = 1 - keep, before = 1 - exact;
    float apart = 0;
    for (int64_t v = 0; v < s.vocab; ++v) apart += std::abs(after * rest[v] - before * plain[v]);
    const float own = after * rest[x] - before * plain[x];
    const float bias = (apart - std::abs(own) + std::abs(own + keep - exact)) / 2;
    if (bias > left + 1e-6) {  // a budget is not refused for a rounding error
      rest.swap(plain);
      cost = 0;
      return exact;
    }
    cost = static_cast<float>(std::min<double>(bias, left));
    return keep;
  }

  // As `borrow`, for a law a(v) of keeping (rules/relaxed.py).
  float relax(bool certain, int64_t x, int64_t level, float& cost) {
    if (certain) std::fill(q.begin(), q.end(), 0.0f), q[x] = 1;
    exact_rest(false, x, plain.data());
    const float exact = ratio(p[x], q[x], 1);
    if (s.rule == Judged::kGrouped)
      group();
    else
      for (int64_t v = 0; v < s.vocab; ++v)
        keep[v] = ratio(p[v], q[v], std::max(1.0f, s.delta * std::exp(-s.nu * level - s.mu)));
    float kept = 0;
    for (int64_t v = 0; v < s.vocab; ++v) {
      kept += q[v] * keep[v];
      rest[v] = std::max(p[v] - (s.rule == Judged::kGrouped ? q[v] : q[v] * keep[v]), 0.0f);
    }
    normalise(rest.data(), plain.data(), s.vocab);
    const float lost = std::max(1 - kept, 0.0f);
    float bias = 0;
    for (int64_t v = 0; v < s.vocab; ++v) bias += std::abs(q[v] * keep[v] + lost * rest[v] - p[v]);
    bias /= 2;
    if (bias > left) {
      rest.swap(plain);
      return exact;
    }
    cost = bias;
    return keep[x];
  }
  static float ratio(float p, float q, float factor) {
    return q > 0 ? std::min(factor * p / std::max(q, std::numeric_limits<float>::min()), 1.0f) : 1.0f;
  }

  // a(v) = p(C(v)) / q(C(v)), C(v) the `near` tokens whose rank under p is closest to v's own.
  void group() {
    std::vector<int32_t> order(s.vocab);
    std::vector<double> of_p(s.vocab + 1), of_q(s.vocab + 1);
    for (int64_t v = 0; v < s.vocab; ++v) order[v] = static_cast<int32_t>(v);
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return p[a] != p[b] ? p[a] > p[b] : a < b; });
    for (int64_t i = 0; i < s.vocab; ++i) of_p[i + 1] = of_p[i] + p[order[i]], of_q[i + 1] = of_q[i] + q[order[i]];
    const int64_t below = s.near / 2;
    for (int64_t i = 0; i < s.vocab; ++i) {
      const int64_t first = std::max<int64_t>(i - below, 0), last = std::min(i - below + s.near, s.vocab);
      const double mine = of_p[last] - of_p[first], theirs = of_q[last] - of_q[first];
      const double share = theirs > 0 ? std::clamp(mine / std::max(theirs, 1e-300), 0.0, 1.0) : 1.0;
      keep[order[i]] = p[order[i]] > 0 ? static_cast<float>(share) : 0.0f;
    }
  }

  // CASCADE (rules/cascade.py): siblings that the drafter finds alike count together, and converging laws are trusted.
  float cascade(bool certain, int64_t node, int64_t kid, float px, float qx, float& cost) {
    const float safe = std::max(qx, std::numeric_limits<float>::min()), exact = std::min(px / safe, 1.0f);
    float pooled = 0;
    const int64_t* kids = children(node);
    for (int64_t c = 0; c < s.most; ++c)
      if (kids[c] != 0 && (kids[c] == kid || alike(kid, kids[c]))) pooled += p[token(kids[c])];
    const float more = px > 0 ? lift(law_at(node), law_at(kid)) : 0;
    const float keep = std::min(std::min(pooled / safe, 1.0f) + more, 1.0f);
    exact_rest(certain, token(kid), rest.data());
    // What follows a reject is the same law: the decisions differ by what they keep of the token.
    float apart = 0;
    const float by = exact - keep;
    for (int64_t v = 0; v < s.vocab; ++v) apart += std::abs(by * rest[v]);
    const float own = by * rest[token(kid)], bias = (apart - std::abs(own) + std::abs(own - by)) / 2;
    if (bias > left) return exact;
    cost = bias;
    return keep;
  }
  bool alike(int64_t a, int64_t b_) const {
    if (s.hidden == nullptr) return false;
    const float *one = s.hidden + (b * (s.nodes + 1) + a) * s.dim, *other = s.hidden + (b * (s.nodes + 1) + b_) * s.dim;
    float dot = 0, x = 0, y = 0;
    for (int64_t d = 0; d < s.dim; ++d) dot += one[d] * other[d], x += one[d] * one[d], y += other[d] * other[d];
    return dot > s.delta * std::max(std::sqrt(x), 1e-12f) * std::max(std::sqrt(y), 1e-12f);
  }
  float lift(const float* parent, const float* child) const {
    float a = 0, c = 0, dot = 0, x = 0, y = 0, apart = 0;
    const auto held = [](float log_p) { return std::max(log_p, -30.0f); };
    for (int64_t v = 0; v < s.vocab; ++v) a += held(parent[v]), c += held(child[v]);
    a /= s.vocab, c /= s.vocab;
    for (int64_t v = 0; v < s.vocab; ++v) {
      const float one = held(parent[v]) - a, other = held(child[v]) - c;
      dot += one * other, x += one * one, y += other * other;
      apart += p_of(parent[v]) * (held(parent[v]) - held(child[v]));
    }
    const float cosine = dot / std::max(std::sqrt(x) * std::sqrt(y), 1e-8f);
    return cosine > s.lambda && apart < s.nu ? s.mu * cosine : 0;
  }
  static float p_of(float log_p) { return std::exp(log_p); }

  // A node's children one by one, until one is kept: returns it, or 0 with what to draw from in p.
  int64_t judge(int64_t node, int64_t level) {
    const float* drafted = draft_law(node);
    const bool certain = drafted == nullptr;
    if (!certain) chances(drafted, q.data(), s.vocab);
    const int64_t* kids = children(node);
    for (int64_t c = 0; c < s.most; ++c) {
      const int64_t kid = kids[c];
      if (kid == 0) continue;
      const int64_t x = token(kid);
      const float px = p[x], qx = certain ? 1.0f : q[x];
      if (!(qx > 0)) continue;
      float cost = 0, chance = px;
      double u = coin(kid, 0);
      if (s.rule == Judged::kTree)
        exact_rest(certain, x, rest.data()), u *= qx;
      else if (s.rule == Judged::kAnnealed || s.rule == Judged::kGrouped)
        chance = relax(certain, x, level, cost);
      else if (s.rule == Judged::kCascade)
        chance = cascade(certain, node, kid, px, qx, cost);
      else
        chance = borrow(certain, x, px, qx, cost);
      margin(level) = std::min(margin(level), margin_of(u, std::log(static_cast<double>(chance))));
      s.spent[b] += cost, left -= cost;
      if (u < chance) return kid;
      p.swap(rest);
      if (!certain) leave(q.data(), x, s.vocab);
    }
    return 0;
  }

  void run(int64_t image) {
    b = image, left = s.slack == nullptr ? std::numeric_limits<double>::infinity() : s.slack[b];
    s.spent[b] = 0;
    std::fill_n(s.margins + b * columns, columns, std::numeric_limits<float>::infinity());
    if (s.rule == Judged::kTraversal) return traverse();
    int64_t node = 0, level = 0, *way = s.way + b * columns;
    way[0] = 0;
    chances(law_at(0), p.data(), s.vocab);
    while (level < s.levels) {
      const int64_t kid = judge(node, level);
      if (kid == 0) break;
      way[++level] = node = kid;
      chances(law_at(node), p.data(), s.vocab);
    }
    for (int64_t j = level + 1; j < columns; ++j) way[j] = node;
    finish(node, level, p.data(), level);
  }

  // The tokens of the way, and behind `level` of them one drawn from weights.
  void finish(int64_t node, int64_t level, const float* weights, int64_t column) {
    const int64_t* way = s.way + b * columns;
    int64_t* out = s.out + b * columns;
    for (int64_t j = 0; j < columns; ++j) out[j] = j < s.levels ? token_or_zero(way[j + 1]) : 0;
    out[level] = weighted_draw(weights, s.vocab, coin(node, 1), &margin(column));
    s.accepted[b] = level;
  }
  int64_t token_or_zero(int64_t node) const { return node ? token(node) : 0; }

  // Leaves first: the weights of all nodes, then the first of them in post-order that is accepted.
  void traverse() {
    const int64_t count = s.nodes + 1, v = s.vocab;
    std::vector<double> weights(count, 0.0);
    std::vector<float> rests(count * v);
    weights[0] = 1;
    for (int64_t node = 0; node < count; ++node) {
      float* own = rests.data() + node * v;
      chances(law_at(node), own, v);
      lower(node, own, weights);
    }
    const int64_t* order = tree_row(s.order, 0, 1, count);
    int64_t best = 0;
    for (int64_t node = 1; node < count; ++node)
      if (coin(node, 0) < weights[node] && order[node] < order[best]) best = node;
    float& near = s.margins[b * columns];
    for (int64_t node = 1; node < count; ++node)
      if (order[node] <= order[best]) near = std::min(near, margin_of(coin(node, 0), std::log(weights[node])));
    const int64_t level = *tree_row(s.depth, best, 1, count);
    std::copy_n(tree_row(s.path, best, columns, count), columns, s.way + b * columns);
    finish(best, level, rests.data() + best * v, 0);
  }

  void lower(int64_t node, float* own, std::vector<double>& weights) {
    double w = weights[node];
    const float* drafted = nullptr;
    const int64_t* kids = children(node);
    for (int64_t c = 0; c < s.most; ++c) {
      const int64_t kid = kids[c];
      if (kid == 0) continue;
      if (drafted == nullptr && s.draft != nullptr) chances(drafted = draft_law(node), q.data(), s.vocab);
      const bool certain = s.draft == nullptr;
      const int64_t x = token(kid);
      const float qx = certain ? 1.0f : q[x];
      if (!(qx > 0)) continue;
      weights[kid] = std::min(w * own[x] / std::max(qx, 1e-38f), 1.0);
      const float by = static_cast<float>(w);
      for (int64_t v = 0; v < s.vocab; ++v) rest[v] = std::max(by * own[v] - (certain ? float(v == x) : q[v]), 0.0f);
      const double sum = sum_of(rest.data(), s.vocab), lost = sum + 1 - w;
      normalise(rest.data(), own, s.vocab);
      std::copy_n(rest.data(), s.vocab, own);
      w = lost > 0 ? sum / std::max(lost, 1e-38) : 1;
      if (!certain) leave(q.data(), x, s.vocab);
    }
    weights[node] = w;
  }
};

// A window's place behind what was accepted: the draft where it is kept, else a draw from [p - q]+; behind the last
// draft a draw from p.
inline void draw_behind(const Judged& s, int64_t b, int64_t w) {
  const int64_t places = s.nodes + 1, at = b * places + w, columns = s.levels + 1;
  const double* u = s.uniforms + (b * places + (w < s.nodes ? w + 1 : 0)) * 2;
  float& near = s.margins[b * columns + w];
  near = std::numeric_limits<float>::infinity();
  const float* log_p = s.law + at * s.vocab;
  int64_t& out = s.out[b * columns + w];
  if (w < s.nodes) {
    const Coupling found = coupled(log_p, s.draft + (b * s.laws + w) * s.vocab, s.tokens[b * s.nodes + w], s.vocab,
                                   u[0], u[1]);
    out = found.token, near = found.margin;
  } else {
    std::vector<float> p(s.vocab);
    chances(log_p, p.data(), s.vocab);
    out = weighted_draw(p.data(), s.vocab, u[0], &near);
  }
}

// What a verdict commits to images (decoding/loop.py): never past their end.
struct Committed {
  int64_t batch, length, columns, margins, depth;  // columns of `out`; of `near`, 0: none; most drafts kept by a pass
  int64_t bytes;                                   // of a token
  const char* out;                                 // [B, columns]
  const int64_t* accepted;                         // [B]
  const float *near, *drawn, *cost;                // [B, margins], [B] or null, [B] or null
  const int64_t *count, *passes, *drafted, *kept;  // [B], before
  const float *margin, *spent;
  char* tokens;                                    // [B, length]
  int64_t* sums;                                   // [5, B]: the four after it, and how many were committed
  float* figures;                                  // [2, B]: margin and spent after it
};

inline void commit(const Committed& c) {
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t left = c.length - c.count[b], fresh = std::min(c.accepted[b] + 1, left);
    std::memcpy(c.tokens + (b * c.length + c.count[b]) * c.bytes, c.out + b * c.columns * c.bytes, fresh * c.bytes);
    const int64_t sums[] = {c.count[b] + fresh, c.passes[b] + 1, c.drafted[b] + std::min(left, c.depth),
                            c.kept[b] + std::min(c.accepted[b], left), fresh};
    for (int64_t i = 0; i < 5; ++i) c.sums[i * c.batch + b] = sums[i];
    float margin = c.margin[b];
    for (int64_t i = 0; i < std::min(c.margins, left); ++i) margin = std::min(margin, c.near[b * c.margins + i]);
    if (c.drawn != nullptr) margin = std::min(margin, c.drawn[b]);
    c.figures[b] = margin;
    c.figures[c.batch + b] = c.spent[b] + (c.cost == nullptr ? 0 : c.cost[b]);
  }
}

inline void judge(const Judged& s) {
  const int64_t places = s.batch * (s.nodes + 1);
  together(std::min(s.threads, s.window ? places : s.batch), [&](const Team& team) {
    Walk walk(s);
    for (int64_t b = team.first(s.batch); b < team.last(s.batch); ++b) walk.run(b);
    if (!s.window) return;
    team.meet();
    for (int64_t i = team.first(places); i < team.last(places); ++i) {
      const int64_t b = i / (s.nodes + 1), w = i % (s.nodes + 1);
      if (w > s.accepted[b]) draw_behind(s, b, w);
    }
  });
}

}  // namespace bozzetto
