// sample_slots (DESIGN section 5.8): sample_tokens for rows whose parameters lie in a table by slot, and the early
// rejection of section 3.3 with the sums that the table keeps.
//
//   t = position + 1 - BASE    n = t + 1    term(n) = lambda n - log n    W = cumw + weight
//   rejected = W + max(term(CAN_END_EARLY ? n : HORIZON), term(HORIZON)) < THETA
//
// Bytes: those of sample_tokens, and about 150 of the table a row. Rows that are not ours are not read.

#include "sampling.h"
#include "state.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace power_kernels {
namespace {

struct Slot {
  const int64_t* field;  // null: the row is not ours
  const float* exponent;
  const double* bound;
  double* cumw;

  int64_t operator[](SlotField column) const { return field[static_cast<int64_t>(column)]; }
  double operator[](SlotBound column) const { return bound[static_cast<int64_t>(column)]; }
  float alpha() const { return exponent[0]; }
  float beta() const { return exponent[1]; }
};

struct Table {
  const int64_t* field;
  const float* exponent;
  const double* bound;
  double* cumw;
  int64_t slots;

  Table(const Tensor& field_, const Tensor& exponent_, const Tensor& bound_, const Tensor& cumw_)
      : field(static_cast<const int64_t*>(field_.data_ptr())),
        exponent(static_cast<const float*>(exponent_.data_ptr())),
        bound(static_cast<const double*>(bound_.data_ptr())),
        cumw(static_cast<double*>(cumw_.data_ptr())),
        slots(field_.size(0)) {
    STD_TORCH_CHECK(field_.dim() == 2 && field_.size(1) == SLOT_FIELDS && field_.element_size() == 8 &&
                        field_.is_contiguous(),
                    "field must be contiguous int64 [slots, 12]");
    STD_TORCH_CHECK(exponent_.numel() == 2 * slots && exponent_.element_size() == 4 && exponent_.is_contiguous(),
                    "exponent must be contiguous float32 [slots, 2]");
    STD_TORCH_CHECK(bound_.numel() == 2 * slots && bound_.element_size() == 8 && bound_.is_contiguous(),
                    "bound must be contiguous float64 [slots, 2]");
    STD_TORCH_CHECK(cumw_.numel() == slots && cumw_.element_size() == 8 && cumw_.is_contiguous(),
                    "cumw must be contiguous float64 [slots]");
  }

  Slot operator[](int64_t s) const {
    if (s < 0 || s >= slots || !field[s * SLOT_FIELDS + static_cast<int64_t>(SlotField::ACTIVE_)]) return {};
    return {field + s * SLOT_FIELDS, exponent + 2 * s, bound + 2 * s, cumw + s};
  }
};

// Two comparisons rather than one with the larger term: a NaN then rejects nothing, whatever max makes of it.
bool rejects(const Slot& slot, double weight_sum, int64_t length) {
  const auto below = [&](int64_t tokens) {
    const double n = static_cast<double>(std::max<int64_t>(tokens, 1));
    return weight_sum + (slot[SlotBound::LENGTH_BONUS_] * n - std::log(n)) < slot[SlotBound::THETA_];
  };
  const int64_t horizon = slot[SlotField::HORIZON_];
  return below(slot[SlotField::CAN_END_EARLY_] ? length : horizon) && below(horizon);
}

// Where a row's results go: rows of any stride, the largest batch's.
template <class T>
T* output_of(const Tensor& t, int64_t rows, int64_t dims, const char* name) {
  STD_TORCH_CHECK(t.dim() == dims && t.size(0) >= rows && t.element_size() == sizeof(T), name,
                  " has the wrong shape or dtype");
  return static_cast<T*>(t.data_ptr());
}

}  // namespace

void sample_slots_out(Tensor field, Tensor exponent, Tensor bound, Tensor cumw, Tensor logits_, Tensor slot_,
                      Tensor position_, Tensor live_, Tensor workspace, Tensor token_, Tensor values_, Tensor flags_,
                      bool entropy) {
  const Table table(field, exponent, bound, cumw);
  const Logits logits(logits_);
  const int64_t B = logits.rows;
  const auto slot = vector_of<const int64_t>(slot_, B, "slot");
  const auto position = vector_of<const int64_t>(position_, B, "position");
  const auto live = vector_of<const bool>(live_, B, "live");
  int64_t* token = output_of<int64_t>(token_, B, 1, "token");
  float* values = output_of<float>(values_, B, 2, "values");
  int64_t* flags = output_of<int64_t>(flags_, B, 1, "flags");
  STD_TORCH_CHECK(values_.size(1) == 3, "values must have 3 columns");
  const int64_t token_stride = token_.stride(0), flags_stride = flags_.stride(0);
  const int64_t row_stride = values_.stride(0), column_stride = values_.stride(1);

  std::vector<float> betas(B);
  for (int64_t b = 0; b < B; ++b) {
    const Slot s = table[slot[b]];
    betas[b] = s.field ? s.beta() : NAN;  // unsound: the mass pass leaves the row out
  }
  TileMass* all_records = mass_pass(logits, Vector<const float>{betas.data(), 1}, entropy, workspace);

  torch::stable::parallel_for(0, B, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Slot s = table[slot[b]];
      if (!s.field) continue;
      // Unsigned, so that a position nobody looked at wraps instead of being undefined.
      const int64_t t = static_cast<int64_t>(static_cast<uint64_t>(position[b]) + 1 -
                                             static_cast<uint64_t>(s[SlotField::BASE_]));
      const Words counter = counter_words(t, s[SlotField::SERIAL_], s[SlotField::CHAIN_ID_], s[SlotField::PROMPT_ID_],
                                          STREAM_POSITION);
      const Draw drawn = draw_row(logits, b, s.alpha(), s.beta(), counter, s[SlotField::SEED_],
                                  t == s[SlotField::FIRST_] ? s[SlotField::EXCLUDE_] : -1, entropy,
                                  all_records + b * logits.tiles);
      const int64_t stop = s[SlotField::STOP_TOKEN_];
      int64_t emitted = std::max<int64_t>(stop, 0), flag = static_cast<int64_t>(drawn.row.status);
      TokenScore scored{NAN, NAN, NAN};
      double row_entropy = NAN;
      if (drawn.row.status == Status::OK_) {
        scored = score(drawn.row, drawn.z, s.alpha(), s.beta());
        row_entropy = drawn.row.entropy;
        emitted = drawn.token;
        if (live[b]) {
          *s.cumw += static_cast<double>(scored.weight);
          const int64_t length = static_cast<int64_t>(static_cast<uint64_t>(t) + 1);
          if (rejects(s, *s.cumw, length)) {
            flag |= static_cast<int64_t>(SlotFlag::REJECTED_);
            if (stop >= 0) emitted = stop;
          }
        }
      }
      token[b * token_stride] = emitted;
      flags[b * flags_stride] = flag;
      float* row = values + b * row_stride;
      row[0] = scored.logq;
      row[column_stride] = scored.weight;
      row[2 * column_stride] = entropy ? static_cast<float>(row_entropy) : 0.0f;
    }
  });
}

void add_slots(torch::stable::detail::StableLibrary& m) { m.impl("sample_slots_out", TORCH_BOX(&sample_slots_out)); }

}  // namespace power_kernels
