// Verdicts of rules/cspd.py over whole chains.
#pragma once
#include "noise.h"

namespace bozzetto {

// Target and draft: states, means and deviations [B][length + 1 or length][steps + 1, steps, steps][dim, dim, width].
struct Cspd {
  int64_t batch, length, steps, dim, width, released, tries;
  float heat, last;  // heat: inner temperature; last: deviation of a last step that has none
  const float *states, *mean, *std, *drafted, *draft_mean, *draft_std;
  const int64_t* keys;  // [B][length + 1]
  float* tokens;        // [B][length + 1][dim]
  int64_t* accepted;    // [B]
};

struct Deciding {
  const Cspd& s;
  std::vector<float> noise;
  std::vector<uint8_t> kept;

  explicit Deciding(const Cspd& s) : s(s), noise(s.dim), kept(s.length) {}

  struct LastStep {
    const float *mean, *std;
  };
  LastStep of(const float* mean, const float* std, int64_t path) const {
    const int64_t at = (path + 1) * s.steps - 1;
    return {mean + at * s.dim, std + at * s.width};
  }
  float deviation(const LastStep& law, int64_t i) const {
    const float std = law.std[s.width == 1 ? 0 : i];
    return std > 0 ? std : s.last;
  }
  double density(const float* x, const LastStep& law, float heat) const {
    double sum = 0;
    for (int64_t i = 0; i < s.dim; ++i) {
      const float std = deviation(law, i) * heat, z = (x[i] - law.mean[i]) / std;
      sum += 0.5f * (z * z) + std::log(std);
    }
    return -sum - 0.5 * static_cast<double>(s.dim) * std::log(2 * 3.14159265358979323846);
  }
  double deviations(const float* std, int64_t path) const {  // logarithm of their product but for the last step
    double sum = 0;
    for (int64_t i = 0; i < (s.steps - 1) * s.width; ++i) {
      const double one = std[path * s.steps * s.width + i];
      sum += one > 0 ? std::log(one) : 0.0;
    }
    return sum * static_cast<double>(s.dim / s.width);
  }

  void image(int64_t b) {
    const auto target = [&](int64_t l) { return b * (s.length + 1) + l; };
    const auto own = [&](int64_t l) { return s.states + (target(l) * (s.steps + 1) + s.steps) * s.dim; };
    const auto draft = [&](int64_t l) { return s.drafted + ((b * s.length + l) * (s.steps + 1) + s.steps) * s.dim; };
    int64_t accepted = s.length;
    for (int64_t l = s.length - 1; l >= 0; --l) {
      const LastStep p = of(s.mean, s.std, target(l)), q = of(s.draft_mean, s.draft_std, b * s.length + l);
      const double ratio = sigma(b, l) + density(draft(l), p, s.heat) - density(draft(l), q, s.heat);
      kept[l] = std::log(uniform(folded<uint64_t>(s.keys[target(l)], 0))) < ratio;
      if (!kept[l]) accepted = l;
    }
    for (int64_t l = 0; l <= s.length; ++l) {
      float* to = s.tokens + target(l) * s.dim;
      const bool keep = l < s.length && (s.released ? kept[l] : l < accepted);
      std::copy_n(keep ? draft(l) : own(l), s.dim, to);
      if (l < s.length && !keep && (s.released || l == accepted)) redraw(b, l, to);
    }
    s.accepted[b] = s.released ? s.length : accepted;
  }

  double sigma(int64_t b, int64_t l) const {
    const double ours = deviations(s.std, b * (s.length + 1) + l), theirs = deviations(s.draft_std, b * s.length + l);
    return s.released ? ours - theirs : theirs - ours;
  }

  void redraw(int64_t b, int64_t l, float* to) {
    const int64_t at = b * (s.length + 1) + l;
    const LastStep p = of(s.mean, s.std, at), q = of(s.draft_mean, s.draft_std, b * s.length + l);
    for (int64_t attempt = 1; attempt <= s.tries; ++attempt) {
      const uint64_t key = folded<uint64_t>(s.keys[at], attempt);
      normal_row(folded<uint64_t>(key, 1), s.dim, noise.data());
      for (int64_t i = 0; i < s.dim; ++i) noise[i] = p.mean[i] + deviation(p, i) * noise[i];
      const double log_q_p = density(noise.data(), q, 1) - sigma(b, l) - density(noise.data(), p, 1);
      if (std::log(uniform(folded<uint64_t>(key, 0))) > log_q_p) return void(std::copy_n(noise.data(), s.dim, to));
    }
  }
};

inline void decide(const Cspd& s) {
  Deciding deciding(s);
  for (int64_t b = 0; b < s.batch; ++b) deciding.image(b);
}

}  // namespace bozzetto
