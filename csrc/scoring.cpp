// score_tokens (DESIGN sections 2 and 5.2): logp, logq and weight of given tokens; the mass pass of mass.h
// (V*itemsize bytes a row) and a finisher that reads one logit.

#include "mass.h"

#include <optional>

namespace power_kernels {

void score_tokens_out(Tensor logits_, Tensor tokens_, Tensor alpha_, Tensor beta_, Tensor workspace, Tensor logp_,
                      Tensor logq_, Tensor weight_, std::optional<Tensor> entropy_, Tensor status_) {
  const Logits logits(logits_);
  const int64_t N = logits.rows;
  const auto tokens = vector_of<const int64_t>(tokens_, N, "tokens");
  const auto alpha = vector_of<const float>(alpha_, N, "alpha");
  const auto beta = vector_of<const float>(beta_, N, "beta");
  const Quantities out(N, logp_, logq_, weight_, entropy_, status_);

  const TileMass* all_slots = mass_pass(logits, beta, out.has_entropy, workspace);
  torch::stable::parallel_for(0, N, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      RowMass row = combine(all_slots + b * logits.tiles, logits.tiles, alpha[b], beta[b], out.has_entropy);
      const int64_t x = tokens[b];
      if (row.status == Status::OK_ && (x < 0 || x >= logits.V)) row.status = Status::BAD_TOKEN_;
      const double z = row.status == Status::OK_ ? logits.kernels->logit(logits.row(b), x) : NAN;
      out.write(b, row, z, alpha[b], beta[b]);
    }
  });
}

void add_scoring(torch::stable::detail::StableLibrary& m) { m.impl("score_tokens_out", TORCH_BOX(&score_tokens_out)); }

}  // namespace power_kernels
