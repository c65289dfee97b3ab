// The kernels of our own: what other languages call. Each header says what it is for.
#include "advance.h"
#include "cspd.h"
#include "gauss.h"
#include "glance.h"
#include "head.h"
#include "masked.h"
#include "sketch.h"
#include "walk.h"

extern "C" {

int bozzetto_lanes() { return static_cast<int>(bozzetto::kLanes); }

void bozzetto_pass(const bozzetto::Network* network, const bozzetto::Pass* pass) {
  if (network->half)
    bozzetto::run<bozzetto::bf16>(*network, *pass);
  else
    bozzetto::run<float>(*network, *pass);
}

// After a pass over a tree: what lies `path[b][t]` columns behind the start moves to t behind it.
void bozzetto_compact(const bozzetto::Network* network, int64_t batch, int64_t copies, int64_t slots, int64_t lead,
                      int64_t steps, const int64_t* start, const int64_t* path, void* const* caches) {
  auto* move = network->half ? &bozzetto::compact<bozzetto::bf16> : &bozzetto::compact<float>;
  move(*network, batch, copies, slots, lead, steps, start, path, caches);
}

// A linear map of rows, into rows of its own type (how 0), float32 (1), or added to float32 (2).
void bozzetto_linear(int64_t threads, int64_t half, const bozzetto::Map* map, const void* x, int64_t rows, void* to,
                     int64_t how) {
  const bozzetto::Into into{to, static_cast<decltype(bozzetto::Into::how)>(how)};
  bozzetto::together(threads, [&](const bozzetto::Team& team) {
    if (half)
      bozzetto::product(team, *map, static_cast<const bozzetto::bf16*>(x), rows, into);
    else
      bozzetto::product(team, *map, static_cast<const float*>(x), rows, into);
  });
}

// Gumbel noise of positions' keys: [rows, count].
void bozzetto_gumbel(int64_t threads, const uint64_t* keys, int64_t rows, int64_t count, float* out) {
  bozzetto::together(std::min(threads, rows), [&](const bozzetto::Team& team) {
    for (int64_t r = team.first(rows); r < team.last(rows); ++r) bozzetto::gumbel_row(keys[r], count, out + r * count);
  });
}

// Fresh uniforms [B, places, per] of a pass: by image, pass, position and number.
void bozzetto_uniforms(const uint64_t* keys, const int64_t* passes, const int64_t* count, int64_t batch, int64_t places,
                       int64_t per, double* out) {
  for (int64_t b = 0; b < batch; ++b) {
    const uint64_t own = bozzetto::folded<uint64_t>(keys[b], passes[b]);
    for (int64_t w = 0; w < places; ++w) {
      const uint64_t place = bozzetto::folded<uint64_t>(own, count[b] + w);
      for (int64_t i = 0; i < per; ++i) *out++ = bozzetto::uniform(bozzetto::folded<uint64_t>(place, i));
    }
  }
}

// Laws [B, W, V] of logits [B, W, V], or [2 B, W, V] = [cond; uncond]; settings of every image.
void bozzetto_laws(int64_t threads, const float* logits, int64_t copies, int64_t batch, int64_t width, int64_t count,
                   const float* guidance, const float* temperature, const int64_t* top_k, const float* top_p,
                   float* out) {
  const int64_t rows = batch * width;
  bozzetto::together(std::min(threads, rows), [&](const bozzetto::Team& team) {
    for (int64_t r = team.first(rows); r < team.last(rows); ++r) {
      const int64_t b = r / width;
      const bozzetto::LawOf settings{guidance[b], temperature[b], top_p == nullptr ? 1.0f : top_p[b],
                                     top_k == nullptr ? 0 : top_k[b]};
      const float* uncond = copies > 1 ? logits + (rows + r) * count : nullptr;
      bozzetto::law(logits + r * count, uncond, count, settings, out + r * count);
    }
  });
}

// Draws of rows of laws + noise, and their margins.
void bozzetto_draw(int64_t threads, const float* laws, const float* noise, int64_t rows, int64_t count, int64_t* tokens,
                   float* margins) {
  bozzetto::together(std::min(threads, rows), [&](const bozzetto::Team& team) {
    for (int64_t r = team.first(rows); r < team.last(rows); ++r)
      tokens[r] = bozzetto::draw(laws + r * count, noise + r * count, count, margins + r);
  });
}

void bozzetto_chain(const bozzetto::Denoiser* head, const bozzetto::Chain* chain) {
  (head->half ? &bozzetto::run_chain<bozzetto::bf16> : &bozzetto::run_chain<float>)(*head, *chain);
}

void bozzetto_cspd(const bozzetto::Cspd* given) { bozzetto::decide(*given); }

// Normal noise of keys: [rows, count].
void bozzetto_normal(const uint64_t* keys, int64_t rows, int64_t count, float* out) {
  for (int64_t r = 0; r < rows; ++r) bozzetto::normal_row(keys[r], count, out + r * count);
}

// One call of a head: tokens [given, D] under modulations of `rows` rows, copies of them one after another.
void bozzetto_narrow(int64_t threads, const bozzetto::Denoiser* head, const float* tokens, int64_t given,
                     const void* modulation, int64_t rows, float* out) {
  auto* run = head->half ? &bozzetto::run_narrow<bozzetto::bf16> : &bozzetto::run_narrow<float>;
  run(threads, *head, tokens, given, modulation, rows, out);
}

// Chains of Gaussians: laws [R][dim] of centre and variance, noise [R][steps + 1][dim]; results as of GaussianChain::draw.
void bozzetto_gaussian(const bozzetto::Axes* axes, int64_t rows, const float* centre, const float* variance,
                       const float* noise, float* gain, float* offset, float* states, float* mean) {
  const bozzetto::GaussianChain chain(*axes);
  const int64_t d = axes->dim, t = axes->steps;
  for (int64_t r = 0; r < rows; ++r) {
    const float* law[4] = {centre + r * d, variance + r * d, nullptr, nullptr};
    chain.draw(law, noise + r * (t + 1) * d, rows * d, gain + r * d, offset + r * d, states + r * (t + 1) * d,
               mean + r * t * d);
  }
}

void bozzetto_draft(const bozzetto::Drafts* drafts) {
  (drafts->network->half ? &bozzetto::draft<bozzetto::bf16> : &bozzetto::draft<float>)(*drafts);
}

void bozzetto_advance(const bozzetto::Slots* slots) {
  bozzetto::Advancing advancing(*slots);
  const int64_t places = slots->batch * slots->width;
  bozzetto::together(std::min(slots->threads, places), [&](const bozzetto::Team& team) { advancing.run(team); });
}

void bozzetto_glance(const bozzetto::Glance* glance, const bozzetto::Look* look) {
  (glance->half ? &bozzetto::run_glance<bozzetto::bf16> : &bozzetto::run_glance<float>)(*glance, *look);
}

void bozzetto_sketch(const bozzetto::Sketch* sketch) {
  (sketch->half ? &bozzetto::sketch<bozzetto::bf16> : &bozzetto::sketch<float>)(*sketch);
}

void bozzetto_commit(const bozzetto::Committed* committed) { bozzetto::commit(*committed); }

void bozzetto_judge(const bozzetto::Judged* judged) { bozzetto::judge(*judged); }

void bozzetto_masked(const bozzetto::Masked* network, const bozzetto::Given* given) {
  (network->half ? &bozzetto::run_masked<bozzetto::bf16> : &bozzetto::run_masked<float>)(*network, *given);
}
}
