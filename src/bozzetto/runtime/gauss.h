// Denoising chains of Gaussian laws, which are known in closed form (laws/gaussian.py), and drafts of a draft model whose
// laws of the next token are such Gaussians (drafters/gaussian.py), token after token as one call.
#pragma once
#include <memory>

#include "pass.h"

namespace bozzetto {

// Sampler and axes. ancestry: [4][steps], signal, noise, of_token, of_state; basis: [dim][dim] or null; other: whether
// every law comes with that of the unconditional row, from which guidance goes away.
struct Axes {
  int64_t steps, dim, other;
  float guidance;
  const float *ancestry, *std, *basis;
};

struct GaussianChain {
  const Axes& a;
  std::vector<float> across;  // the basis, transposed

  explicit GaussianChain(const Axes& a) : a(a), across(a.basis == nullptr ? 0 : a.dim * a.dim) {
    for (size_t i = 0; i < across.size(); ++i) across[i] = a.basis[i % a.dim * a.dim + i / a.dim];
  }

  // Rows [count][dim] times a matrix.
  void times(const float* rows, int64_t count, const float* matrix, float* out) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < a.dim; d += kLanes) {
        const int64_t left = a.dim - d;
        Floats sum{};
        for (int64_t i = 0; i < a.dim; ++i) sum += rows[r * a.dim + i] * some(matrix + i * a.dim + d, left);
        put(sum, out + r * a.dim + d, left);
      }
  }

  // Of one token: centre, variance, and those of the unconditional row -> gain and offset of every step, `apart` numbers
  // from step to step, states [steps + 1][dim] and means [steps][dim] with noise [steps + 1][dim].
  void draw(const float* const law[4], const float* noise, int64_t apart, float* gain, float* offset, float* states,
            float* mean) const {
    const int64_t d = a.dim, t = a.steps;
    std::vector<float> room(a.basis == nullptr ? 0 : (3 * t + 2) * d);
    float *x = states, *m = mean;
    if (a.basis != nullptr) {
      times(noise, t + 1, across.data(), room.data());
      noise = room.data(), x = room.data() + (t + 1) * d, m = x + (t + 1) * d;
    }
    std::copy_n(noise, d, x);
    for (int64_t k = 0; k < t; ++k) {
      const float signal = a.ancestry[k], rest = a.ancestry[t + k], of_token = a.ancestry[2 * t + k];
      const float of_state = a.ancestry[3 * t + k], square = rest * rest;
      for (int64_t i = 0; i < d; ++i) {
        float both[2][2];
        for (int64_t copy = 0; copy <= a.other; ++copy) {
          const float centre = law[2 * copy][i], variance = law[2 * copy + 1][i];
          const float share = signal * variance / (signal * signal * variance + square);
          both[copy][0] = of_token * share + of_state, both[copy][1] = of_token * (1 - share * signal) * centre;
        }
        for (int64_t part = 0; part < 2; ++part)
          if (a.other) both[0][part] = both[1][part] + a.guidance * (both[0][part] - both[1][part]);
        gain[k * apart + i] = both[0][0], offset[k * apart + i] = both[0][1];
        m[k * d + i] = offset[k * apart + i] + gain[k * apart + i] * x[k * d + i];
        x[(k + 1) * d + i] = m[k * d + i] + noise[(k + 1) * d + i] * a.std[k];
      }
    }
    if (a.basis != nullptr) times(x, t + 1, a.basis, states), times(m, t, a.basis, mean);
  }
};

// A draft of `places` tokens from the hidden states [R][dim] of the last prediction.
struct Drafts {
  const Axes* axes;
  const Network* network;
  const Pass* layers;                 // the caches, and what is fixed about them
  Map embed, fc, hidden, readout;     // token -> what stands for it; [it; feature] -> input; feature -> law, float32
  int64_t threads, batch, copies, places;
  float bound;                        // of the logarithm of a deviation
  const void* last;                   // [R][dim]
  const int64_t* start;               // [B], slot of the first drafted pair
  const float* noise;                 // [B][places][steps + 1][dim of a token]
  float *gain, *offset;               // [steps][B places][dim of a token]
  float *states, *mean;               // [B][places][steps + 1 or steps][dim of a token]
};

template <typename T>
struct Drafting {
  const Drafts& s;
  const int64_t dim, rows, d;
  GaussianChain chain;
  std::vector<Pass> passes;
  std::vector<std::unique_ptr<Run<T>>> runs;
  std::vector<int64_t> starts;
  std::vector<T> feature, token, embedded, pairs, input, narrow;
  std::vector<float> wide, said;

  explicit Drafting(const Drafts& s)
      : s(s), dim(s.network->dim), rows(s.batch * s.copies), d(s.axes->dim), chain(*s.axes) {
    feature.resize(rows * dim), embedded.resize(s.batch * dim), pairs.resize(rows * 2 * dim), input.resize(rows * dim);
    token.resize(s.batch * s.embed.inputs), narrow.resize(rows * s.hidden.columns), wide.resize(narrow.size());
    said.resize(rows * 2 * d), starts.resize(s.batch * s.places);
    std::copy_n(static_cast<const T*>(s.last), rows * dim, feature.data());
    passes.reserve(s.places);
    for (int64_t j = 0; j + 1 < s.places; ++j) {
      Pass& pass = passes.emplace_back(*s.layers);
      pass.threads = s.threads, pass.batch = s.batch, pass.copies = s.copies, pass.width = 1;
      pass.layout_slot = pass.depth = nullptr, pass.sees = pass.given_seen = nullptr;
      pass.tokens = nullptr, pass.condition = nullptr;
      pass.x = input.data(), pass.x_rows = rows, pass.hidden = feature.data(), pass.start = &starts[j * s.batch];
      int64_t furthest = 0;
      for (int64_t b = 0; b < s.batch; ++b) furthest = std::max(furthest, starts[j * s.batch + b] = s.start[b] + j);
      pass.reach = std::min(pass.slots, pass.lead + furthest + 1);
      runs.push_back(std::make_unique<Run<T>>(*s.network, pass));
    }
  }

  void draw(int64_t b, int64_t place) {
    const int64_t at = b * s.places + place, t = s.axes->steps;
    std::vector<float> variance(2 * d);
    const float* law[4];
    for (int64_t copy = 0; copy < s.copies; ++copy) {
      const float* row = said.data() + (copy * s.batch + b) * 2 * d;
      for (int64_t i = 0; i < d; ++i)
        variance[copy * d + i] = std::exp(2 * s.bound * std::tanh(row[d + i] / s.bound));
      law[2 * copy] = row, law[2 * copy + 1] = variance.data() + copy * d;
    }
    float* states = s.states + at * (t + 1) * d;
    chain.draw(law, s.noise + at * (t + 1) * d, s.batch * s.places * d, s.gain + at * d, s.offset + at * d, states,
               s.mean + at * t * d);
    for (int64_t i = 0; i < d; ++i) assign(token[b * s.embed.inputs + i], states[t * d + i]);
  }

  void run(const Team& team) {
    for (int64_t place = 0; place < s.places; ++place) {
      product(team, s.hidden, feature.data(), rows, {narrow.data(), Into::kSilu});
      team.meet();
      const int64_t count = static_cast<int64_t>(wide.size());
      for (int64_t i = team.first(count); i < team.last(count); ++i) wide[i] = number(narrow[i]);
      team.meet();
      product<float>(team, s.readout, wide.data(), rows, {said.data(), Into::kFloat});
      team.meet();
      for (int64_t b = team.first(s.batch); b < team.last(s.batch); ++b) draw(b, place);
      team.meet();
      if (place + 1 == s.places) return;
      product(team, s.embed, token.data(), s.batch, {embedded.data(), Into::kPlain});
      team.meet();
      for (int64_t r = team.first(rows); r < team.last(rows); ++r) {
        std::copy_n(embedded.data() + r % s.batch * dim, dim, pairs.data() + r * 2 * dim);
        std::copy_n(feature.data() + r * dim, dim, pairs.data() + r * 2 * dim + dim);
      }
      team.meet();
      product(team, s.fc, pairs.data(), rows, {input.data(), Into::kPlain});
      team.meet();
      runs[place]->run(team);
      team.meet();
    }
  }
};

template <typename T>
void draft(const Drafts& s) {
  Drafting<T> drafting(s);
  together(s.threads, [&](const Team& team) { drafting.run(team); });
}

}  // namespace bozzetto
