// sample_from_hidden and score_from_hidden (DESIGN section 5.3): the LM head fused with sampling and scoring.
//
//   z[b, v] = cap(scale * (hidden[b, :] . lm_head[v, :] + bias[v])),  cap(t) = softcap * tanh(t / softcap)
//
// The product is our own (lm_head_kernel.h): a BLAS sums a row in another order when it stands in another batch, and
// cannot look at the logits while they are in the cache.
//
//   sampling   z to the scratch [B, V], blocks of the vocabulary in parallel; then sampling.cpp reads the scratch.
//              Bytes: V*D*itemsize read once, 4*B*V written and read
//   scoring    blocks of CHUNK rows and one tile of the vocabulary: z of a block stays in the second-level cache, where
//              the mass pass of mass.h reads it and the given tokens' logits are picked. No logits in memory.
//              Bytes: V*D*itemsize read once by each chunk (all but the first time from a cache that holds a tile's
//              weights), 16*N*V/TILE written
//
// Sums are float32 in a fixed order (lm_head_kernel.h), so no bit depends on the batch, the split among threads, or on
// which of the two operators computes the product.

#include "isa.h"
#include "mass.h"

#include <algorithm>
#include <memory>
#include <new>
#include <optional>

namespace power_kernels {

// sampling.cpp
void sample_tokens_out(Tensor logits, Tensor alpha, Tensor beta, Tensor seed, Tensor counter,
                       std::optional<Tensor> exclude, Tensor workspace, Tensor token, Tensor logp, Tensor logq,
                       Tensor weight, std::optional<Tensor> entropy, Tensor status);

namespace {

struct HeadKernels {
  void (*product)(const void* hidden, int64_t hidden_pitch, int64_t rows, const void* weights, int64_t weight_pitch,
                  int64_t n, int64_t D, void* scratch, float* z, int64_t z_pitch);
  void (*finish)(float* z, int64_t n, const void* bias, float softcap, float scale);
};

constexpr int64_t CHUNK = 96;          // rows of a block: with a tile of logits about what a second-level cache holds
constexpr int64_t DEPTH_BYTES = 3072;  // of a row, most that is multiplied at a time: two panels fit the first level
constexpr int64_t DEPTH_UNIT = 32;     // the longest K_STEP of any instruction set
constexpr int64_t STRIP = 64;          // weights that stay in the second-level cache
constexpr int64_t SLICE = 256;         // entries of the vocabulary that sampling computes at a time
constexpr int64_t PITCH = TILE + 16;   // a power of two would put a column of logits into one set of the cache

#define PK_BODY "lm_head_kernel.h"
#define PK_WITH_DOT_BF16
#include "for_each_isa.h"

int dtype_index(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "hidden, lm_head and bias must be float32, float16 or bfloat16");
  return dtype == ScalarType::Float ? 0 : dtype == ScalarType::Half ? 1 : 2;
}

const HeadKernels& head_kernels(torch::headeronly::ScalarType dtype) {
  [[maybe_unused]] static const Isa isa = instruction_set();
  const int index = dtype_index(dtype);
#if defined(__x86_64__)
  if (isa == AVX512_BF16) return avx512_bf16::kernels(index);
  if (isa == AVX512) return avx512::kernels(index);
  if (isa == AVX2) return avx2::kernels(index);
#endif
  return baseline::kernels(index);
}

struct Head {
  const char *hidden, *weights, *bias;
  int64_t rows, V, D, hidden_pitch, weight_pitch, item_bytes, bias_bytes;
  float softcap, scale;
  bool plain;
  const HeadKernels *kernels, *bias_kernels;

  Head(const Tensor& h, const Tensor& w, const std::optional<Tensor>& b, double softcap_, double scale_) {
    STD_TORCH_CHECK(h.dim() == 2 && w.dim() == 2 && h.size(1) == w.size(1) && w.size(0) >= 1 && w.size(1) >= 1,
                    "hidden must be [rows, D] and lm_head [V, D] with V, D >= 1");
    STD_TORCH_CHECK(h.scalar_type() == w.scalar_type(), "hidden and lm_head must have one dtype");
    STD_TORCH_CHECK(h.size(1) == 1 || (h.stride(1) == 1 && w.stride(1) == 1),
                    "hidden and lm_head must have unit inner stride");
    STD_TORCH_CHECK(!b || (b->dim() == 1 && b->size(0) == w.size(0) && (b->size(0) == 1 || b->stride(0) == 1)),
                    "bias must be contiguous [V]");
    hidden = static_cast<const char*>(h.data_ptr());
    weights = static_cast<const char*>(w.data_ptr());
    bias = b ? static_cast<const char*>(b->data_ptr()) : nullptr;
    rows = h.size(0), V = w.size(0), D = w.size(1);
    hidden_pitch = h.stride(0), weight_pitch = w.stride(0);
    item_bytes = w.element_size();
    bias_bytes = b ? b->element_size() : 0;
    softcap = static_cast<float>(softcap_), scale = static_cast<float>(scale_);
    plain = !b && scale == 1.f && !(softcap > 0.f);
    kernels = &head_kernels(w.scalar_type());
    bias_kernels = b ? &head_kernels(b->scalar_type()) : kernels;
  }

  // Logits [first, first + n) of rows [row, row + count), at most CHUNK of them.
  void logits(int64_t row, int64_t count, int64_t first, int64_t n, float* scratch, float* z, int64_t pitch) const {
    kernels->product(hidden + row * hidden_pitch * item_bytes, hidden_pitch, count,
                     weights + first * weight_pitch * item_bytes, weight_pitch, n, D, scratch, z, pitch);
    if (plain) return;
    for (int64_t r = 0; r < count; ++r)
      bias_kernels->finish(z + r * pitch, n, bias ? bias + first * bias_bytes : nullptr, softcap, scale);
  }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What one thread works on: the logits of a block, then the operands of the product as it takes them.
struct Block {
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<float[], Free> z;
  float* scratch;

  Block(int64_t rows, int64_t pitch, int64_t D) {
    const int64_t width = ceil_div(D, DEPTH_UNIT) * DEPTH_UNIT;
    const int64_t floats = rows * pitch + (rows + 1) * width + STRIP * DEPTH_BYTES / 4;
    z.reset(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t{64})));
    scratch = z.get() + rows * pitch;  // pitches are whole cache lines
  }
};

// Rows a chunk: all chunks about equal, in whole panels.
int64_t chunk_rows(int64_t rows) {
  constexpr int64_t PANEL = 6;
  if (rows <= PANEL) return std::max<int64_t>(rows, 1);
  return ceil_div(ceil_div(rows, ceil_div(rows, CHUNK)), PANEL) * PANEL;
}

}  // namespace

void sample_from_hidden_out(Tensor hidden, Tensor lm_head, std::optional<Tensor> bias, Tensor alpha, Tensor beta,
                            Tensor seed, Tensor counter, std::optional<Tensor> exclude, double softcap, double scale,
                            Tensor logits, Tensor workspace, Tensor token, Tensor logp, Tensor logq, Tensor weight,
                            std::optional<Tensor> entropy, Tensor status) {
  const Head head(hidden, lm_head, bias, softcap, scale);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(0) == head.rows && logits.size(1) == head.V &&
                      logits.element_size() == 4 && logits.is_contiguous(),
                  "logits must be contiguous float32 [rows, V]");
  float* out = static_cast<float*>(logits.data_ptr());
  constexpr int64_t pitch = SLICE + 16;
  const int64_t slices = ceil_div(head.V, SLICE), chunk = chunk_rows(head.rows), chunks = ceil_div(head.rows, chunk);
  torch::stable::parallel_for(0, slices * chunks, 1, [&](int64_t begin, int64_t end) {
    const Block block(chunk, pitch, head.D);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / chunks * SLICE, n = std::min(SLICE, head.V - first);
      const int64_t row = i % chunks * chunk, count = std::min(chunk, head.rows - row);
      head.logits(row, count, first, n, block.scratch, block.z.get(), pitch);
      for (int64_t r = 0; r < count; ++r)
        std::memcpy(out + (row + r) * head.V + first, block.z.get() + r * pitch, n * sizeof(float));
    }
  });
  sample_tokens_out(logits, alpha, beta, seed, counter, exclude, workspace, token, logp, logq, weight, entropy,
                    status);
}

void score_from_hidden_out(Tensor hidden, Tensor lm_head, std::optional<Tensor> bias, Tensor tokens_, Tensor alpha_,
                           Tensor beta_, double softcap, double scale, Tensor workspace, Tensor logp_, Tensor logq_,
                           Tensor weight_, std::optional<Tensor> entropy_, Tensor status_) {
  const Head head(hidden, lm_head, bias, softcap, scale);
  const int64_t N = head.rows;
  const auto tokens = vector_of<const int64_t>(tokens_, N, "tokens");
  const auto alpha = vector_of<const float>(alpha_, N, "alpha");
  const auto beta = vector_of<const float>(beta_, N, "beta");
  const Quantities out(N, logp_, logq_, weight_, entropy_, status_);
  const int64_t tiles = ceil_div(head.V, TILE), chunk = chunk_rows(N), chunks = ceil_div(N, chunk);
  STD_TORCH_CHECK(workspace.element_size() == 4 && workspace.is_contiguous() &&
                      workspace.numel() >= N * (4 * tiles + 1),
                  "workspace must be contiguous float32 with 4 * ceil(V / 256) + 1 elements a row");
  TileMass* slots = static_cast<TileMass*>(workspace.data_ptr());
  float* chosen = static_cast<float*>(workspace.data_ptr()) + 4 * N * tiles;  // the given tokens' logits
  const MassKernels& masses = mass_kernels(torch::headeronly::ScalarType::Float);

  // A thread takes the chunks of one tile in a row, while its cache holds the tile's weights.
  torch::stable::parallel_for(0, tiles * chunks, 1, [&](int64_t begin, int64_t end) {
    const Block block(chunk, PITCH, head.D);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / chunks, first = t * TILE, n = std::min(TILE, head.V - first);
      const int64_t row = i % chunks * chunk, count = std::min(chunk, N - row);
      head.logits(row, count, first, n, block.scratch, block.z.get(), PITCH);
      for (int64_t r = 0; r < count; ++r) {
        const float* z = block.z.get() + r * PITCH;
        const int64_t b = row + r, x = tokens[b] - first;
        masses.mass(z, n, 0, 1, beta[b], out.has_entropy, slots + b * tiles + t);
        if (x >= 0 && x < n) chosen[b] = z[x];
      }
    }
  });
  torch::stable::parallel_for(0, N, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      RowMass row = combine(slots + b * tiles, tiles, alpha[b], beta[b], out.has_entropy);
      const int64_t x = tokens[b];
      if (row.status == Status::OK_ && (x < 0 || x >= head.V)) row.status = Status::BAD_TOKEN_;
      out.write(b, row, chosen[b], alpha[b], beta[b]);
    }
  });
}

void add_lm_head(torch::stable::detail::StableLibrary& m) {
  m.impl("sample_from_hidden_out", TORCH_BOX(&sample_from_hidden_out));
  m.impl("score_from_hidden_out", TORCH_BOX(&score_from_hidden_out));
}

}  // namespace power_kernels
