// A denoising head (targets/denoiser.py): its narrow layers under given modulations, [rows][(3 depth + 2) width] with
// "1 + scale" for scale, and whole chains of its steps from conditions. What lies between maps is in float32.
#pragma once
#include <memory>

#include "linear.h"
#include "noise.h"

namespace bozzetto {

struct HeadBlock {
  Map up, down;
  const float *gain, *bias;  // of the norm
};

struct Denoiser {
  int64_t half, width, depth, token_dim, out_dim;
  Map input, output;  // in float32
  const HeadBlock* blocks;
  Map condition, change;  // what a condition says, and the modulations: change(silu(time + condition(z)))

  int64_t stride() const { return (3 * depth + 2) * width; }  // modulations of a row
};

template <typename T>
struct Narrow {
  const Denoiser& h;
  int64_t rows;
  std::vector<float> x, y, last;
  std::vector<T> normed, act;

  Narrow(const Denoiser& h, int64_t rows) : h(h), rows(rows) {
    x.resize(rows * h.width), y.resize(rows * h.width), last.resize(rows * h.width);
    normed.resize(rows * h.width), act.resize(rows * h.width);
  }

  // shift + scale * norm(x) of a row, after what the last block adds to it: gate * y.
  template <typename To>
  void modulated(int64_t r, const T* gate, const T* shift, const T* scale, const float* gain, const float* bias,
                 To* to) {
    float* row = x.data() + r * h.width;
    const float count = static_cast<float>(h.width);
    Floats sum{};
    for (int64_t d = 0; d < h.width; d += kLanes) {
      const int64_t left = h.width - d;
      Floats v = some(row + d, left);
      if (gate != nullptr) put(v = v + some(gate + d, left) * some(y.data() + r * h.width + d, left), row + d, left);
      sum += v;
    }
    const float mean = summed(sum) / count;
    Floats square{};
    for (int64_t d = 0; d < h.width; d += kLanes) {
      const int64_t left = h.width - d;
      Floats v = some(row + d, left) - mean;
      for (int64_t j = left; j < kLanes; ++j) v[j] = 0;
      square += v * v;
    }
    const float by = 1.0f / std::sqrt(summed(square) / count + 1e-6f);
    for (int64_t d = 0; d < h.width; d += kLanes) {
      const int64_t left = h.width - d;
      Floats v = (some(row + d, left) - mean) * by;
      if (gain != nullptr) v = v * some(gain + d, left) + some(bias + d, left);
      put(some(shift + d, left) + some(scale + d, left) * v, to + r * h.width + d, left);
    }
  }

  // Tokens [given, token_dim], of which the rows are copies one after another -> predictions [rows, out_dim]. Nobody
  // waits at the end.
  void run(const Team& team, const float* tokens, int64_t given, const T* modulation, float* out) {
    const int64_t w = h.width, stride = h.stride();
    product<float>(team, h.input, tokens, given, {x.data(), Into::kFloat});
    team.meet();
    if (given < rows) {
      for (int64_t r = given + team.first(rows - given); r < given + team.last(rows - given); ++r)
        std::copy_n(x.data() + r % given * w, w, x.data() + r * w);
      team.meet();
    }
    const T* gate = nullptr;
    for (int64_t i = 0; i < h.depth; ++i) {
      const HeadBlock& b = h.blocks[i];
      const T* own = modulation + 3 * i * w;
      for (int64_t r = team.first(rows); r < team.last(rows); ++r)
        modulated(r, gate == nullptr ? nullptr : gate + r * stride, own + r * stride, own + r * stride + w, b.gain, b.bias,
                  normed.data());
      team.meet();
      product(team, b.up, normed.data(), rows, {act.data(), Into::kSilu});
      team.meet();
      product(team, b.down, act.data(), rows, {y.data(), Into::kFloat});
      team.meet();
      gate = own + 2 * w;
    }
    const T* own = modulation + 3 * h.depth * w;
    for (int64_t r = team.first(rows); r < team.last(rows); ++r)
      modulated<float>(r, gate == nullptr ? nullptr : gate + r * stride, own + r * stride, own + r * stride + w, nullptr,
                       nullptr, last.data());
    team.meet();
    product<float>(team, h.output, last.data(), rows, {out, Into::kFloat});
  }
};

// Chains of `places` tokens from their noise [places][steps + 1][D], with conditions [copies places][...], embedded
// times [steps][width] and coefficients [steps][3 or 5] (targets/heads.py); or chains coupled with drafts by reflection
// (rules/chains.py).
struct Chain {
  int64_t threads, places, copies, steps, learned;  // learned: whether variances are predicted
  const void *conditions, *times;
  const float *coefficients, *guidance;  // guidance: of a place
  float temperature;
  const float* noise;                         // [places][steps + 1][D], or null: coupled with drafts
  int64_t width;                              // places of an image, of which the last has no draft
  const float *drafted, *draft_mean;          // [B][width - 1][steps + 1 or steps][D], of the same deviations
  const int64_t* keys;                        // [places], of the coins, and of what the last place has for a draft
  float *states, *mean, *std;                 // results; std [places][steps][D] only where learned
};

constexpr int64_t kMadeTogether = 64;  // rows of modulations

template <typename T>
struct ChainRun {
  const Denoiser& h;
  const Chain& c;
  int64_t rows, ahead;  // of a call; steps whose modulations are made together
  Narrow<T> narrow;
  std::vector<float> now, predicted, fresh, nothing;  // fresh: of each image's last place
  std::unique_ptr<T[]> told, moved, table;  // of conditions; silu of these with times; modulations

  ChainRun(const Denoiser& h, const Chain& c)
      : h(h),
        c(c),
        rows(c.places * c.copies),
        ahead(std::clamp<int64_t>(kMadeTogether / rows, 1, c.steps)),
        narrow(h, rows) {
    now.resize(c.places * h.token_dim);
    predicted.resize(rows * h.out_dim);
    if (c.noise == nullptr) fresh.resize(c.places / c.width * (c.steps + 1) * h.token_dim), nothing.resize(h.token_dim);
    told = std::make_unique_for_overwrite<T[]>(rows * h.width);
    moved = std::make_unique_for_overwrite<T[]>(ahead * rows * h.width);
    table = std::make_unique_for_overwrite<T[]>(ahead * rows * h.stride());
  }

  // Modulations of a step; products of many rows read the weights once.
  const T* modulation(const Team& team, int64_t k) const {
    if (k % ahead == 0) {
      const int64_t count = std::min(ahead, c.steps - k) * rows, w = h.width;
      for (int64_t r = team.first(count); r < team.last(count); ++r) {
        const T *time = static_cast<const T*>(c.times) + (k + r / rows) * w, *said = told.get() + r % rows * w;
        for (int64_t d = 0; d < w; d += kLanes) {
          const Floats y = rounded<T>(some(time + d, w - d) + some(said + d, w - d));
          put(y / (1.0f + exponential(-y)), moved.get() + r * w + d, w - d);
        }
      }
      team.meet();
      product(team, h.change, moved.get(), count, {table.get(), Into::kPlain});
      team.meet();
    }
    return table.get() + k % ahead * rows * h.stride();
  }

  void step(int64_t p, int64_t k) {
    const int64_t d = h.token_dim;
    const float *a = c.coefficients + k * (c.learned ? 5 : 3), *cond = predicted.data() + p * h.out_dim;
    const float* uncond = predicted.data() + (c.places + p) * h.out_dim;
    float *x = now.data() + p * d, *mean = c.mean + (p * c.steps + k) * d;
    const float scale = c.copies > 1 ? c.guidance[p] : 1.0f;
    for (int64_t i = 0; i < d; ++i) {
      const float guided = c.copies > 1 ? uncond[i] + scale * (cond[i] - uncond[i]) : cond[i];
      mean[i] = a[0] * x[i] + a[1] * guided;
    }
    float* next = c.states + (p * (c.steps + 1) + k + 1) * d;
    if (c.noise == nullptr) {
      coupled(p, k, mean, a[2], next);
    } else {
      const float* noise = c.noise + (p * (c.steps + 1) + k + 1) * d;
      for (int64_t i = 0; i < d; ++i) {
        float std = a[2];
        if (c.learned) {
          const float share = (cond[d + i] + 1) / 2;
          std = std::exp(0.5f * (a[2] + share * (a[3] - a[2]))) * (a[4] * c.temperature);
          c.std[(p * c.steps + k) * d + i] = std;
        }
        next[i] = mean[i] + std * noise[i];
      }
    }
    std::copy_n(next, d, x);
  }

  bool alone(int64_t p) const { return p % c.width == c.width - 1; }  // fresh noise of mean 0 stands for a draft there
  const float* drawn(int64_t p, int64_t k) const {
    const int64_t b = p / c.width, d = h.token_dim;
    if (alone(p)) return fresh.data() + (b * (c.steps + 1) + k) * d;
    return c.drafted + ((p - b) * (c.steps + 1) + k) * d;
  }

  // rules/coupling.py: reflect.
  void coupled(int64_t p, int64_t k, const float* mean, float std, float* next) const {
    const int64_t d = h.token_dim;
    const float *drafted = drawn(p, k + 1), *theirs = alone(p) ? nothing.data() : c.draft_mean + ((p - p / c.width) * c.steps + k) * d;
    const float by = alone(p) ? 1.0f : std;
    float along = 0, square = 0;
    for (int64_t i = 0; i < d; ++i) {
      const float gap = (mean[i] - theirs[i]) / std, noise = (drafted[i] - theirs[i]) / by;
      along += gap * noise, square += gap * gap;
    }
    const double log_u = std::log(uniform(folded<uint64_t>(c.keys[p], k)));
    if (!alone(p) && log_u <= static_cast<double>(along - 0.5f * square)) {
      std::copy_n(drafted, d, next);
    } else {
      const float share = along / std::max(square, 1e-30f);
      for (int64_t i = 0; i < d; ++i) {
        const float gap = (mean[i] - theirs[i]) / std, noise = (drafted[i] - theirs[i]) / by;
        next[i] = mean[i] + std * (noise - 2 * share * gap);
      }
    }
  }

  void run(const Team& team) {
    const int64_t d = h.token_dim;
    for (int64_t p = team.first(c.places); p < team.last(c.places); ++p) {
      if (c.noise == nullptr && alone(p))
        normal_row(c.keys[p], (c.steps + 1) * d, fresh.data() + p / c.width * (c.steps + 1) * d);
      std::copy_n(c.noise == nullptr ? drawn(p, 0) : c.noise + p * (c.steps + 1) * d, d, now.data() + p * d);
      std::copy_n(now.data() + p * d, d, c.states + p * (c.steps + 1) * d);
    }
    product(team, h.condition, static_cast<const T*>(c.conditions), rows, {told.get(), Into::kPlain});
    team.meet();
    for (int64_t k = 0; k < c.steps; ++k) {
      narrow.run(team, now.data(), c.places, modulation(team, k), predicted.data());
      team.meet();
      for (int64_t p = team.first(c.places); p < team.last(c.places); ++p) step(p, k);
      team.meet();
    }
  }
};

template <typename T>
void run_chain(const Denoiser& h, const Chain& c) {
  ChainRun<T> chain(h, c);
  together(c.threads, [&](const Team& team) { chain.run(team); });
}

template <typename T>
void run_narrow(int64_t threads, const Denoiser& h, const float* tokens, int64_t given, const void* modulation, int64_t rows,
                float* out) {
  Narrow<T> narrow(h, rows);
  together(threads, [&](const Team& team) { narrow.run(team, tokens, given, static_cast<const T*>(modulation), out); });
}

}  // namespace bozzetto
