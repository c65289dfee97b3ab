// Laws of codes (laws/categorical.py): raw logits to log-probabilities, and draws from them.
#pragma once
#include "lanes.h"

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

}  // namespace bozzetto
