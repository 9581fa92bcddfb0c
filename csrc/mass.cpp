// Instances of mass_kernel.h for each instruction set, the choice among them, and the threaded mass pass.

#include "isa.h"
#include "mass.h"

namespace power_kernels {

#define PK_BODY "mass_kernel.h"
#include "for_each_isa.h"

const MassKernels& mass_kernels(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  [[maybe_unused]] static const Isa isa = instruction_set();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "logits must be float32, float16 or bfloat16");
  const int index = dtype == ScalarType::Float ? 0 : dtype == ScalarType::Half ? 1 : 2;
#if defined(__x86_64__)
  if (isa >= AVX512) return avx512::kernels(index);
  if (isa == AVX2) return avx2::kernels(index);
#endif
  return baseline::kernels(index);
}

Logits::Logits(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) >= 1, "logits must have shape [rows, V] with V >= 1");
  STD_TORCH_CHECK(t.size(1) == 1 || t.stride(1) == 1, "logits must have unit stride along the vocabulary");
  data = static_cast<const char*>(t.data_ptr());
  rows = t.size(0);
  V = t.size(1);
  item_bytes = t.element_size();
  row_bytes = t.stride(0) * item_bytes;
  tiles = (V + TILE - 1) / TILE;
  kernels = &mass_kernels(t.scalar_type());
}

TileMass* mass_pass(const Logits& logits, const Vector<const float>& beta, bool entropy, const Tensor& workspace) {
  const int64_t tiles = logits.tiles;
  STD_TORCH_CHECK(workspace.element_size() == 4 && workspace.is_contiguous() &&
                      workspace.numel() >= logits.rows * tiles * 4,
                  "workspace must be contiguous float32 with 4 * ceil(V / 256) elements a row");
  TileMass* slots = static_cast<TileMass*>(workspace.data_ptr());
  // Every slot depends on its own tile only, so the split among threads cannot change a result.
  constexpr int64_t GRAIN = 8;  // tiles; about 5 us, the cost of waking a thread
  torch::stable::parallel_for(0, logits.rows * tiles, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t b = i / tiles, first = i - b * tiles;
      const int64_t last = first + (end - i) < tiles ? first + (end - i) : tiles;
      // `combine` does not look at the records of a row whose beta is unsound.
      if (sound_exponent(beta[b]))
        logits.kernels->mass(logits.row(b), logits.V, first, last, beta[b], entropy, slots + b * tiles);
      i += last - first;
    }
  });
  return slots;
}

}  // namespace power_kernels
