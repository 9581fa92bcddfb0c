// The mass pass (DESIGN sections 2, 4 and 5): what one read of the logits leaves behind for the finishers.
//
//   per (row, tile): max  = max z                                 z = the tile's logits as fp32
//                    r1   = sum exp(z - max)        without ONE entry that attains the maximum
//                    rb   = sum exp(beta*(z - max)) without the same entry
//                    moment = sum exp(z - max)*(z - max)          only when the entropy is wanted, else 0
//   per row, combined in tile order in float64:
//                    m = max over tiles, R1, Rb, moment relative to m, again without one argmax
//
// Leaving the argmax out keeps the digits of nearly deterministic rows: LSE(z) - m = log1p(R1).
// A NaN anywhere in a tile makes its r1 NaN; a tile with +inf and no NaN has max = +inf and r1 = 0.
//
// Bytes: V*itemsize read once from memory and 16 bytes written per tile. Each tile is copied, as fp32, to an 8 KB
// buffer while its maximum is found; the exponentials then read the first-level cache.
#pragma once

#include "state.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace power_kernels {

using torch::stable::Tensor;

// Long enough that its reductions cost little, short enough to stay in 32 KB of cache next to the following
// tile, which is prefetched meanwhile.
constexpr int64_t TILE = 2048;

struct TileMass {  // one workspace slot
  float max, r1, rb, moment;
};

struct MassKernels {
  // Tiles [first, last) of one row of V logits. slots: the row's slots.
  void (*mass)(const void* row, int64_t V, int64_t first, int64_t last, float beta, bool entropy, TileMass* slots);
  // One tile of n logits without entry `skip` (-1: none).
  TileMass (*mass_without)(const void* tile, int64_t n, int64_t skip, float beta);
  // The first entry of the tile whose CDF, a float64 scan of the masses without `skip`, exceeds `fraction` of the
  // tile's total. -1 when the tile holds no mass.
  int64_t (*draw)(const void* tile, int64_t n, int64_t skip, float beta, double fraction);
  float (*logit)(const void* row, int64_t v);
  // A tile of n logits as fp32 in z, TILE entries, those behind the n -inf.
  void (*copy)(const void* tile, int64_t n, float* z);
  // These take such a z, of which entries [0, n) may have mass, and sum masses exp(alpha (z - max)) in float64.
  int64_t (*argmax)(const float* z, int64_t n);  // the first
  double (*sum)(const float* z, int64_t n, double alpha, float max);
  // The first entry whose running sum exceeds target; the last one that adds to the sum where none does.
  int64_t (*search)(const float* z, int64_t n, double alpha, float max, double target);
};

// The kernels for this machine and this dtype. Throws for a dtype that is not float32, float16 or bfloat16.
const MassKernels& mass_kernels(torch::headeronly::ScalarType dtype);

struct Logits {
  const char* data;
  int64_t rows, V, row_bytes, item_bytes, tiles;
  const MassKernels* kernels;

  explicit Logits(const Tensor& t);
  const void* row(int64_t b) const { return data + b * row_bytes; }
  const void* tile(int64_t b, int64_t t) const { return data + b * row_bytes + t * TILE * item_bytes; }
  int64_t tile_size(int64_t t) const { return t + 1 < tiles ? TILE : V - t * TILE; }
};

// A one-dimensional argument: any stride, so that an expanded scalar needs no copy.
template <class T>
struct Vector {
  T* data;
  int64_t stride;
  T& operator[](int64_t i) const { return data[i * stride]; }
};

template <class T>
Vector<T> vector_of(const Tensor& t, int64_t n, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, name, " must have shape [", n, "]");
  STD_TORCH_CHECK(t.element_size() == sizeof(T), name, " has the wrong dtype");
  return {static_cast<T*>(t.data_ptr()), t.stride(0)};
}

// Runs the mass pass over every (row, tile). Returns the slots, [rows, tiles], in the workspace.
TileMass* mass_pass(const Logits& logits, const Vector<const float>& beta, bool entropy, const Tensor& workspace);

struct RowMass {
  Status status;
  double max, log1p_r1, log1p_rb, entropy;
};

inline bool sound_exponent(double value) { return value > 0 && value < INFINITY; }

inline RowMass combine(const TileMass* slots, int64_t tiles, double alpha, double beta, bool entropy) {
  const double nan = std::nan("");
  // The Python wrapper refuses unsound exponents, but not under torch.compile or when the operators are called directly.
  const bool sound = sound_exponent(alpha) && sound_exponent(beta);
  RowMass row{sound ? Status::OK_ : Status::NAN_, -INFINITY, nan, nan, nan};
  if (!sound) return row;
  int64_t top = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    if (std::isnan(slots[t].r1)) row.status = Status::NAN_;
    if (slots[t].max > row.max) row.max = slots[t].max, top = t;
  }
  if (row.status == Status::OK_ && row.max == INFINITY) row.status = Status::POS_INF_;
  if (row.status == Status::OK_ && row.max == -INFINITY) row.status = Status::NO_MASS_;
  if (row.status != Status::OK_) return row;
  double r1 = 0, rb = 0, moment = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const TileMass& s = slots[t];
    const double shift = s.max - row.max;
    if (s.max == -INFINITY) continue;
    // Only the tile of the row's maximum leaves its own argmax out.
    const double argmax = t == top ? 0.0 : 1.0;
    const double scale = shift == 0 ? 1.0 : std::exp(shift);
    const double scale_b = shift == 0 ? 1.0 : beta == 1.0 ? scale : std::exp(beta * shift);
    r1 += scale * (argmax + s.r1);
    rb += scale_b * (argmax + s.rb);
    if (entropy) moment += scale * (s.moment + shift * (argmax + s.r1));
  }
  row.log1p_r1 = std::log1p(r1);
  row.log1p_rb = std::log1p(rb);
  if (entropy) row.entropy = row.log1p_r1 - moment / (1.0 + r1);
  return row;
}

struct TokenScore {
  float logp, logq, weight;
};

// z: the token's logit. alpha, beta as the float32 values given.
inline TokenScore score(const RowMass& row, double z, double alpha, double beta) {
  const double minus_inf = -INFINITY;
  if (z == minus_inf) return {-INFINITY, -INFINITY, -INFINITY};
  const double shift = z - row.max;
  const double logp = shift - row.log1p_r1;
  const double logq = beta * shift - row.log1p_rb;
  double weight = row.log1p_rb - beta * row.log1p_r1;
  if (alpha != beta) weight += (alpha - beta) * logp;
  // Exactly w <= 0 there; early rejection relies on it, so rounding may not break it.
  if (1.0 <= beta && beta <= alpha && weight > 0) weight = 0;
  return {static_cast<float>(logp), static_cast<float>(logq), static_cast<float>(weight)};
}

// What sampling and scoring say of each row: in nats, NaN where the status is not OK.
struct Quantities {
  Vector<float> logp, logq, weight, entropy;
  Vector<int32_t> status;
  bool has_entropy;

  Quantities(int64_t rows, const Tensor& logp_, const Tensor& logq_, const Tensor& weight_,
             const std::optional<Tensor>& entropy_, const Tensor& status_)
      : logp(vector_of<float>(logp_, rows, "logp")),
        logq(vector_of<float>(logq_, rows, "logq")),
        weight(vector_of<float>(weight_, rows, "weight")),
        entropy(entropy_ ? vector_of<float>(*entropy_, rows, "entropy") : Vector<float>{}),
        status(vector_of<int32_t>(status_, rows, "status")),
        has_entropy(entropy_.has_value()) {}

  // z: the logit of row b's token, not read where the row's status is not OK.
  void write(int64_t b, const RowMass& row, double z, double alpha, double beta) const {
    const bool ok = row.status == Status::OK_;
    const TokenScore s = ok ? score(row, z, alpha, beta) : TokenScore{NAN, NAN, NAN};
    logp[b] = s.logp;
    logq[b] = s.logq;
    weight[b] = s.weight;
    if (has_entropy) entropy[b] = ok ? static_cast<float>(row.entropy) : NAN;
    status[b] = static_cast<int32_t>(row.status);
  }
};

}  // namespace power_kernels
