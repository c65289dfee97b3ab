// Laws of codes (laws/categorical.py): raw logits to log-probabilities, and draws from them.
#pragma once
#include "lanes.h"
#include "noise.h"

namespace bozzetto {

struct LawOf {
  float guidance, temperature, top_p;
  int64_t top_k;  // 0: all; below 0: the likeliest alone
};

inline float log_sum(const float* x, int64_t count, float most) {
  Floats sum{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i;
    Floats p = exponential(some(x + i, left) - most);
    for (int64_t j = left; j < kLanes; ++j) p[j] = 0;
    // What is left out has -inf, which the exponential takes for its smallest number.
    sum += some(x + i, left) == -std::numeric_limits<float>::infinity() ? Floats{} : p;
  }
  return most + std::log(summed(sum));
}

inline float most_of(const float* x, int64_t count) {
  Floats most = all(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats v = loaded<Floats>(x + i);
    most = v > most ? v : most;
  }
  float found = largest(most);
  for (; i < count; ++i) found = std::max(found, x[i]);
  return found;
}

inline void leave_out(float* x, int64_t count, float least) {
  for (int64_t i = 0; i < count; ++i)
    if (x[i] < least) x[i] = -std::numeric_limits<float>::infinity();
}

// cond, uncond (null: no guidance): logits [count] -> log-probabilities.
inline void law(const float* cond, const float* uncond, int64_t count, const LawOf& s, float* out) {
  static thread_local std::vector<float> sorted;
  const bool guided = uncond != nullptr && s.guidance != 1.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float x = guided ? uncond[i] + (cond[i] - uncond[i]) * s.guidance : cond[i];
    out[i] = x / s.temperature;
  }
  float most = most_of(out, count);
  if (s.top_k < 0) {
    const int64_t best = std::find(out, out + count, most) - out;
    std::fill(out, out + count, -std::numeric_limits<float>::infinity());
    if (best < count) out[best] = 0;
    return;
  }
  if (s.top_k > 0 && s.top_k < count) {
    sorted.assign(out, out + count);
    std::nth_element(sorted.begin(), sorted.begin() + (s.top_k - 1), sorted.end(), std::greater<float>());
    leave_out(out, count, sorted[s.top_k - 1]);
  }
  const float total = log_sum(out, count, most);
  for (int64_t i = 0; i < count; ++i) out[i] -= total;
  if (s.top_p >= 1.0f) return;
  sorted.assign(out, out + count);
  std::sort(sorted.begin(), sorted.end(), std::greater<float>());
  double share = 0;
  int64_t kept = 0;
  while (kept < count && share < s.top_p) share += std::exp(static_cast<double>(sorted[kept++]));
  leave_out(out, count, sorted[kept - 1]);
  const float rest = log_sum(out, count, most_of(out, count));
  for (int64_t i = 0; i < count; ++i) out[i] -= rest;
}

// The best of law + noise, and how far the second best is behind (inf: there is none).
inline int64_t draw(const float* law, const float* noise, int64_t count, float* margin) {
  constexpr float never = -std::numeric_limits<float>::infinity();
  Floats best = all(never), second = all(never);
  Signed where = Signed{} - 1;
  Signed number;
  for (int i = 0; i < kLanes; ++i) number[i] = i;
  for (int64_t i = 0; i < count; i += kLanes, number += static_cast<int32_t>(kLanes)) {
    const int64_t left = count - i;
    Floats x = some(law + i, left) + some(noise + i, left);
    for (int64_t j = left; j < kLanes; ++j) x[j] = never;
    const auto better = x > best;
    const Floats other = better ? best : x;
    second = other > second ? other : second;
    best = better ? x : best;
    where = better ? number : where;
  }
  int lead = 0;
  for (int i = 1; i < kLanes; ++i)
    if (best[i] > best[lead] || (best[i] == best[lead] && where[i] < where[lead])) lead = i;
  float next = second[lead];
  for (int i = 0; i < kLanes; ++i)
    if (i != lead) next = std::max(next, best[i]);
  *margin = next == never ? std::numeric_limits<float>::infinity() : best[lead] - next;
  return std::max<int64_t>(where[lead], 0);
}

inline float sum_of(const float* x, int64_t count) {
  Floats sum{};
  for (int64_t i = 0; i < count; i += kLanes) sum += some(x + i, count - i);
  return summed(sum);
}

// Log-probabilities to probabilities. What is impossible, or nearly, has none: not the exponential's smallest number.
inline void chances(const float* log, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats x = some(log + i, count - i);
    put(x < -87.0f ? Floats{} : exponential(x), out + i, count - i);
  }
}

// A draw from weights [count] >= 0 by two races, as `weighted_draw` of laws/categorical.py; lowers the margin to theirs.
inline int64_t weighted_draw(const float* weights, int64_t count, double u, float* margin) {
  static thread_local std::vector<float> logs, gumbels;
  const int64_t size = static_cast<int64_t>(std::sqrt(static_cast<double>(count - 1))) + 1;
  const int64_t groups = (count + size - 1) / size;
  logs.resize(std::max(groups, size)), gumbels.resize(groups + size);
  gumbel_row(static_cast<uint64_t>(u * 0x1p53), groups + size, gumbels.data());
  const auto held = [&](int64_t group) { return std::min(size, count - group * size); };
  for (int64_t g = 0; g < groups; ++g) {
    float sum = 0;
    for (int64_t i = 0; i < held(g); ++i) sum += weights[g * size + i];
    logs[g] = std::log(sum);
  }
  float first, second;
  const int64_t group = draw(logs.data(), gumbels.data(), groups, &first);
  for (int64_t i = 0; i < held(group); ++i) logs[i] = std::log(weights[group * size + i]);
  const int64_t found = draw(logs.data(), gumbels.data() + groups, held(group), &second);
  *margin = std::min({*margin, first, second});
  return group * size + found;
}

// A draw of log_p that is a token drawn from log_q as often as can be (rules/exact.py), with two uniforms.
struct Coupling {
  int64_t token;
  bool kept;
  float margin;
};

inline Coupling coupled(const float* log_p, const float* log_q, int64_t x, int64_t count, double coin, double other) {
  static thread_local std::vector<float> rest, q;
  const double ratio = log_p[x] - log_q[x], gap = std::abs(std::log(coin) - ratio);
  Coupling found{x, coin < std::exp(ratio), std::numeric_limits<float>::infinity()};
  if (std::isfinite(gap)) found.margin = static_cast<float>(gap);
  if (found.kept) return found;
  rest.resize(count), q.resize(count);
  chances(log_p, rest.data(), count), chances(log_q, q.data(), count);
  float total = 0;
  for (int64_t i = 0; i < count; ++i) total += q[i] = std::max(rest[i] - q[i], 0.0f);
  found.token = weighted_draw(total > 0 ? q.data() : rest.data(), count, other, &found.margin);
  return found;
}

}  // namespace bozzetto
