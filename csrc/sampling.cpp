// sample_tokens (DESIGN sections 2, 4 and 5.1): one draw from q = softmax(beta*z) per row, with its scores.
//
//   mass pass   mass.h: V*itemsize bytes a row
//   finisher    R1, Rb in float64 -> logp, logq, weight of the drawn token x
//               u = the row's Philox uniform; the tile is picked by a float64 prefix over the tile masses, its
//               entry by a float64 scan of that one tile, read again
//   exclude     the excluded entry's tile is summed again without it and the masses are taken relative to the
//               maximum of what is left, so that a dominant excluded token cannot underflow the others.
//               The scores stay those of the full row.
//
// The finisher rescales the remaining uniform to the picked tile's own float64 total, so that the rounding of the
// tile masses never piles probability on a tile's last entry.

#include "sampling.h"

#include <optional>

namespace power_kernels {
namespace {

// Slots are read as floats and then reused: the last two floats become the float64 CDF after the tile.
void store_cdf(TileMass* slot, double cdf) { std::memcpy(reinterpret_cast<char*>(slot) + 8, &cdf, 8); }
double load_cdf(const TileMass* slot) {
  double cdf;
  std::memcpy(&cdf, reinterpret_cast<const char*>(slot) + 8, 8);
  return cdf;
}

// The token drawn from row b, whose logits and exponents are known to be sound. excluded: -1 for none.
int64_t draw_token(const Logits& logits, int64_t b, double row_max, float beta, double u, int64_t excluded,
                   TileMass* slots) {
  const int64_t tiles = logits.tiles;
  if (excluded >= 0 && logits.kernels->logit(logits.row(b), excluded) == -INFINITY) excluded = -1;
  const int64_t hole = excluded < 0 ? -1 : excluded / TILE;
  double reference = row_max;
  if (hole >= 0) {
    slots[hole] = logits.kernels->mass_without(logits.tile(b, hole), logits.tile_size(hole),
                                               excluded - hole * TILE, beta);
    reference = -INFINITY;
    for (int64_t t = 0; t < tiles; ++t)
      if (slots[t].max > reference) reference = slots[t].max;
    if (reference == -INFINITY) return excluded;  // nothing else has mass
  }
  double cdf = 0;
  int64_t last = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    if (slots[t].max != -INFINITY) {
      const double shift = slots[t].max - reference;
      const double mass = (shift == 0 ? 1.0 : std::exp(beta * shift)) * (1.0 + slots[t].rb);
      if (cdf + mass > cdf) last = t;
      cdf += mass;
    }
    store_cdf(slots + t, cdf);
  }
  const double target = u * cdf;
  int64_t tile = 0;
  double before = 0;
  // A tile without mass leaves the CDF where it was and so can never be the first to exceed the target.
  for (; tile < last; ++tile) {
    const double after = load_cdf(slots + tile);
    if (after > target) break;
    before = after;
  }
  const double fraction = (target - before) / (load_cdf(slots + tile) - before);
  const int64_t entry = logits.kernels->draw(logits.tile(b, tile), logits.tile_size(tile),
                                             tile == hole ? excluded - hole * TILE : -1, beta, fraction);
  return tile * TILE + entry;
}

}  // namespace

Draw draw_row(const Logits& logits, int64_t b, float alpha, float beta, const Words& counter, uint64_t seed,
              int64_t excluded, bool entropy, TileMass* slots) {
  Draw out{combine(slots, logits.tiles, alpha, beta, entropy), -1, NAN};
  if (out.row.status == Status::OK_ && excluded >= logits.V) out.row.status = Status::BAD_TOKEN_;
  if (out.row.status != Status::OK_) return out;
  out.token = draw_token(logits, b, out.row.max, beta, uniforms(counter, seed).u0, excluded < 0 ? -1 : excluded, slots);
  out.z = logits.kernels->logit(logits.row(b), out.token);
  return out;
}

void sample_tokens_out(Tensor logits_, Tensor alpha_, Tensor beta_, Tensor seed_, Tensor counter_,
                       std::optional<Tensor> exclude_, Tensor workspace, Tensor token_, Tensor logp_, Tensor logq_,
                       Tensor weight_, std::optional<Tensor> entropy_, Tensor status_) {
  const Logits logits(logits_);
  const int64_t B = logits.rows;
  const auto alpha = vector_of<const float>(alpha_, B, "alpha");
  const auto beta = vector_of<const float>(beta_, B, "beta");
  const auto token = vector_of<int64_t>(token_, B, "token");
  const Quantities out(B, logp_, logq_, weight_, entropy_, status_);
  const bool has_exclude = exclude_.has_value();
  const auto exclude = has_exclude ? vector_of<const int64_t>(*exclude_, B, "exclude") : Vector<const int64_t>{};
  STD_TORCH_CHECK(counter_.dim() == 2 && counter_.size(0) == B && counter_.size(1) == 4 &&
                      counter_.element_size() == 4,
                  "counter must be int32 [rows, 4]");
  const uint32_t* counter = static_cast<const uint32_t*>(counter_.data_ptr());
  const int64_t row_stride = counter_.stride(0), word_stride = counter_.stride(1);
  const bool own_seeds = seed_.numel() != 1;
  const auto seed = vector_of<const uint64_t>(seed_, own_seeds ? B : 1, "seed");

  TileMass* all_slots = mass_pass(logits, beta, out.has_entropy, workspace);
  torch::stable::parallel_for(0, B, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Words words;
      for (int i = 0; i < 4; ++i) words.w[i] = counter[b * row_stride + i * word_stride];
      const Draw drawn = draw_row(logits, b, alpha[b], beta[b], words, seed[own_seeds ? b : 0],
                                  has_exclude ? exclude[b] : -1, out.has_entropy, all_slots + b * logits.tiles);
      token[b] = drawn.token;
      out.write(b, drawn.row, drawn.z, alpha[b], beta[b]);
    }
  });
}

void add_sampling(torch::stable::detail::StableLibrary& m) { m.impl("sample_tokens_out", TORCH_BOX(&sample_tokens_out)); }

}  // namespace power_kernels
