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
  const auto logp = vector_of<float>(logp_, N, "logp");
  const auto logq = vector_of<float>(logq_, N, "logq");
  const auto weight = vector_of<float>(weight_, N, "weight");
  const auto status = vector_of<int32_t>(status_, N, "status");
  const bool has_entropy = entropy_.has_value();
  const auto entropy = has_entropy ? vector_of<float>(*entropy_, N, "entropy") : Vector<float>{};

  const TileMass* all_slots = mass_pass(logits, beta, has_entropy, workspace);
  torch::stable::parallel_for(0, N, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      RowMass row = combine(all_slots + b * logits.tiles, logits.tiles, alpha[b], beta[b], has_entropy);
      const int64_t x = tokens[b];
      if (row.status == Status::OK_ && (x < 0 || x >= logits.V)) row.status = Status::BAD_TOKEN_;
      TokenScore s{NAN, NAN, NAN};
      if (row.status == Status::OK_) s = score(row, logits.kernels->logit(logits.row(b), x), alpha[b], beta[b]);
      status[b] = static_cast<int32_t>(row.status);
      logp[b] = s.logp;
      logq[b] = s.logq;
      weight[b] = s.weight;
      if (has_entropy) entropy[b] = row.status == Status::OK_ ? static_cast<float>(row.entropy) : NAN;
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(power_kernels, CPU, m) { m.impl("score_tokens_out", TORCH_BOX(&score_tokens_out)); }

}  // namespace power_kernels
