// One row's draw, shared by sampling.cpp and slots.cpp.
#pragma once

#include "mass.h"
#include "rng.h"

#include <cstdint>

namespace power_kernels {

struct Draw {
  RowMass row;
  int64_t token;  // -1 where the row's status is not OK
  double z;       // its logit, NaN there
};

// Row b of logits after the mass pass, which left the row's records in `slots` (they are overwritten).
// excluded: negative for none; a token outside the vocabulary makes the status BAD_TOKEN.
Draw draw_row(const Logits& logits, int64_t b, float alpha, float beta, const Words& counter, uint64_t seed,
              int64_t excluded, bool entropy, TileMass* slots);

}  // namespace power_kernels
