// The vector code of lm_head.cpp, for one instruction set. lm_head.cpp includes this file once per instruction set,
// each time inside another namespace and target region. See vector.h.
//
// PK_DOT_BF16 (0 or 1) further says whether pairs of bfloat16 are multiplied by one instruction (AVX512_BF16).
//
// Every product z[b, v] = sum_k hidden[b, k] * lm_head[v, k] is summed in one fixed order, whatever the number of rows
// and wherever it stands: entry i of one vector takes k = i, W + i, 2W + i, ... within a block of k
// (pairs of bfloat16: 2i and 2i + 1, 2W + 2i and 2W + 2i + 1, ...), then the entries are added in one tree, then the
// blocks in order. So a row has the same bits alone and in a batch.

#include "vector.h"

constexpr int COLUMNS = 4;                 // entries of the vocabulary a panel
constexpr int ROWS = PK_ISA == 5 ? 6 : 3;  // rows of hidden states a panel: 24 of 32, or 12 of 16 registers add
constexpr int FEW_ROWS = 4;                // up to these the memory is what limits,
constexpr int64_t STREAM_BYTES = 16384;    // where the hidden states stay in the first-level cache beside a weight

// ---- what is multiplied: float32, or pairs of bfloat16

struct FloatProduct {
  typedef float Item;
  typedef F Vector;
  static constexpr int K_STEP = W;
  PK_INLINE Vector load(const Item* p) { return (F) * (const F_any*)p; }
  PK_INLINE F add(F sum, Vector a, Vector b) { return fma(a, b, sum); }
};

#if PK_DOT_BF16
struct PairProduct {
  typedef uint16_t Item;
  typedef __m512bh Vector;
  static constexpr int K_STEP = 2 * W;
  PK_INLINE Vector load(const Item* p) { return (__m512bh)_mm512_loadu_si512(p); }
  PK_INLINE F add(F sum, Vector a, Vector b) { return (F)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif

// How each dtype is multiplied.
template <class T>
struct ProductOf {
  typedef FloatProduct Type;
};
#if PK_DOT_BF16
template <>
struct ProductOf<BFloat16> {
  typedef PairProduct Type;
};
#endif

// n items as the product takes them, zeros up to a whole K_STEP.
template <class T, class P>
PK_INLINE void pack(const typename T::Item* from, int64_t n, int64_t padded, typename P::Item* to) {
  if constexpr (sizeof(typename T::Item) == sizeof(typename P::Item)) {
    __builtin_memcpy(to, from, n * sizeof *to);
  } else {
    int64_t k = 0;
    for (; k + W <= n; k += W) *(F_any*)(to + k) = T::load(from + k);
    if (k < n) {
      typename T::Item items[W] = {};
      __builtin_memcpy(items, from + k, (n - k) * sizeof *from);
      *(F_any*)(to + k) = T::load(items);
    }
  }
  for (int64_t k = n; k < padded; ++k) to[k] = 0;
}

// ---- the product of a panel

typedef float Columns __attribute__((vector_size(COLUMNS * 4)));
typedef float Columns_any __attribute__((vector_size(COLUMNS * 4), aligned(4), may_alias));

// The sums of the entries of four vectors.
PK_INLINE Columns add_entries(const F* a) {
#if PK_ISA == 5
  const __m512 a0 = (__m512)a[0], a1 = (__m512)a[1], a2 = (__m512)a[2], a3 = (__m512)a[3];
  // With masks of ones: the plain forms read uninitialised registers in GCC's header, and it warns of them.
  const F low = (F)_mm512_maskz_unpacklo_ps(-1, a0, a1) + (F)_mm512_maskz_unpackhi_ps(-1, a0, a1);
  const F high = (F)_mm512_maskz_unpacklo_ps(-1, a2, a3) + (F)_mm512_maskz_unpackhi_ps(-1, a2, a3);
  const F all = (F)_mm512_maskz_unpacklo_pd(-1, (__m512d)low, (__m512d)high) +
                (F)_mm512_maskz_unpackhi_pd(-1, (__m512d)low, (__m512d)high);
  const __m256 h = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(-1, (__m512)all, 0),
                                 _mm512_maskz_extractf32x8_ps(-1, (__m512)all, 1));
  return (Columns)_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#elif PK_ISA == 2
  const __m256 p = _mm256_hadd_ps((__m256)a[0], (__m256)a[1]), q = _mm256_hadd_ps((__m256)a[2], (__m256)a[3]);
  const __m256 h = _mm256_hadd_ps(p, q);
  return (Columns)_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#else
  return Columns{horizontal_sum(a[0]), horizontal_sum(a[1]), horizontal_sum(a[2]), horizontal_sum(a[3])};
#endif
}

// z[r][c] = the product of rows r of hidden and c of the weights over k_steps * K_STEP of k, added to what is there if
// `more`.
// While it runs, the cache fetches what lies `ahead` items further in the weights.
template <class P, int R>
static void panel(const typename P::Item* const* weights, int64_t ahead, const typename P::Item* hidden,
                  int64_t hidden_pitch, int64_t k_steps, float* z, int64_t z_pitch, bool more) {
  const typename P::Item *w0 = weights[0], *w1 = weights[1], *w2 = weights[2], *w3 = weights[3];
  F sum[R][COLUMNS] = {};
  for (int64_t s = 0; s < k_steps; ++s) {
    const int64_t k = s * P::K_STEP;
    if (ahead) {
      __builtin_prefetch(w0 + k + ahead);
      __builtin_prefetch(w1 + k + ahead);
      __builtin_prefetch(w2 + k + ahead);
      __builtin_prefetch(w3 + k + ahead);
    }
    const typename P::Vector a = P::load(w0 + k), b = P::load(w1 + k), c = P::load(w2 + k), d = P::load(w3 + k);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const typename P::Vector x = P::load(hidden + r * hidden_pitch + k);
      sum[r][0] = P::add(sum[r][0], a, x);
      sum[r][1] = P::add(sum[r][1], b, x);
      sum[r][2] = P::add(sum[r][2], c, x);
      sum[r][3] = P::add(sum[r][3], d, x);
    }
  }
  if (more) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) *(Columns_any*)(z + r * z_pitch) += add_entries(sum[r]);
  } else {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) *(Columns_any*)(z + r * z_pitch) = add_entries(sum[r]);
  }
}

template <class P>
using Panel = void (*)(const typename P::Item* const*, int64_t, const typename P::Item*, int64_t, int64_t, float*,
                       int64_t, bool);

template <class P>
static Panel<P> panel_of(int64_t rows) {
#if PK_ISA == 5
  constexpr Panel<P> table[] = {panel<P, 1>, panel<P, 2>, panel<P, 3>, panel<P, 4>, panel<P, 5>, panel<P, 6>};
#else
  constexpr Panel<P> table[] = {panel<P, 1>, panel<P, 2>, panel<P, 3>};
#endif
  return table[(rows < ROWS ? rows : ROWS) - 1];
}

// ---- few rows: the memory limits

// The same sums as of panels, in the order in which the weights lie in memory: one stream, which the hardware fetches up
// to twice as fast as four beside each other. partials: R * COLUMNS vectors a block of columns.
template <class T, class P, int R>
static void stream(const typename T::Item* weights, int64_t weight_pitch, int64_t n, const typename P::Item* hidden,
                   int64_t hidden_pitch, int64_t D, int64_t depth, F* partials, float* z, int64_t z_pitch) {
  typedef typename P::Vector Vector;
  const auto load = [](const typename T::Item* p) __attribute__((always_inline)) -> Vector {
    if constexpr (sizeof(typename T::Item) == sizeof(typename P::Item)) return P::load((const typename P::Item*)p);
    else return (Vector)T::load(p);
  };
  for (int64_t v = 0; v < n; v += COLUMNS) {
    for (int c = 0; c < COLUMNS; ++c) {
      const auto* row = weights + (v + c < n ? v + c : n - 1) * weight_pitch;
      F* partial = partials + c;
      for (int64_t first = 0; first < D; first += depth) {
        const int64_t left = D - first < depth ? D - first : depth, whole = left / P::K_STEP * P::K_STEP;
        F sum[R] = {};
#pragma GCC unroll 4
        for (int64_t k = first; k < first + whole; k += P::K_STEP) {
          const Vector w = load(row + k);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sum[r] = P::add(sum[r], w, P::load(hidden + r * hidden_pitch + k));
        }
        if (whole < left) {
          typename T::Item items[P::K_STEP] = {};
          __builtin_memcpy(items, row + first + whole, (left - whole) * sizeof *items);
          const Vector w = load(items);
          for (int r = 0; r < R; ++r) sum[r] = P::add(sum[r], w, P::load(hidden + r * hidden_pitch + first + whole));
        }
        for (int r = 0; r < R; ++r, partial += COLUMNS) *partial = sum[r];
      }
    }
    const F* partial = partials;
    for (int64_t first = 0; first < D; first += depth)
      for (int r = 0; r < R; ++r, partial += COLUMNS) {
        Columns_any* to = (Columns_any*)(z + r * z_pitch + v);
        *to = first ? *to + add_entries(partial) : add_entries(partial);
      }
  }
}

// ---- any number of rows

// z[rows, n] = hidden[rows, D] @ weights[n, D]^T. Pitches in items. z has room for n rounded up to COLUMNS a row, and
// scratch, aligned to vectors, for rows + 1 rows of D floats, D rounded up to DEPTH_UNIT, and STRIP * DEPTH_BYTES.
//
// A strip of weights lies in the second-level cache while all rows pass over it, a panel of hidden states in the first
// while it passes over the strip.
template <class T>
static void product(const void* hidden_, int64_t hidden_pitch, int64_t rows, const void* weights_,
                    int64_t weight_pitch, int64_t n, int64_t D, void* scratch, float* z, int64_t z_pitch) {
  typedef typename ProductOf<T>::Type P;
  typedef typename P::Item Item;
  const auto* hidden = (const typename T::Item*)hidden_;
  const auto* weights = (const typename T::Item*)weights_;
  constexpr int64_t most = DEPTH_BYTES / sizeof(Item);
  const int64_t blocks = (D + most - 1) / most;
  const int64_t depth = ((D + blocks - 1) / blocks + DEPTH_UNIT - 1) / DEPTH_UNIT * DEPTH_UNIT;
  const int64_t pitch = (D + P::K_STEP - 1) / P::K_STEP * P::K_STEP;
  Item* packed = (Item*)scratch;
  Item* staged = packed + rows * pitch;
  for (int64_t r = 0; r < rows; ++r) pack<T, P>(hidden + r * hidden_pitch, D, pitch, packed + r * pitch);

  if (rows <= FEW_ROWS && (rows + 1) * pitch * (int64_t)sizeof(Item) <= STREAM_BYTES) {
    typedef void (*Stream)(const typename T::Item*, int64_t, int64_t, const Item*, int64_t, int64_t, int64_t, F*,
                           float*, int64_t);
    constexpr Stream table[] = {stream<T, P, 1>, stream<T, P, 2>, stream<T, P, 3>, stream<T, P, 4>};
    if (rows > 0)
      table[rows - 1](weights, weight_pitch, n, packed, pitch, D, depth, (F*)staged, z, z_pitch);
    return;
  }
  // With one panel each weight is used once: in the order of memory.
  const int64_t strip = rows <= ROWS ? COLUMNS : STRIP;
  for (int64_t v0 = 0; v0 < n; v0 += strip) {
    const int64_t width = n - v0 < strip ? n - v0 : strip;
    for (int64_t k = 0; k < D; k += depth) {
      const int64_t left = D - k < depth ? D - k : depth, k_steps = (left + P::K_STEP - 1) / P::K_STEP;
      const bool direct = sizeof(typename T::Item) == sizeof(Item) && left == k_steps * P::K_STEP;
      if (!direct)
        for (int64_t v = 0; v < width; ++v)
          pack<T, P>(weights + (v0 + v) * weight_pitch + k, left, k_steps * P::K_STEP, staged + v * depth);
      const Item* from = direct ? (const Item*)weights + v0 * weight_pitch + k : staged;
      const int64_t from_pitch = direct ? weight_pitch : depth;
      int64_t ahead = direct ? strip * weight_pitch : 0;
      for (int64_t r = 0; r < rows; r += ROWS, ahead = 0) {
        const Panel<P> multiply = panel_of<P>(rows - r);
        for (int64_t v = 0; v < width; v += COLUMNS) {
          const Item* column[COLUMNS];
          for (int c = 0; c < COLUMNS; ++c)  // behind the last entry its own row again: those sums are left unused
            column[c] = from + (v + c < width ? v + c : width - 1) * from_pitch;
          multiply(column, ahead, packed + r * pitch + k, pitch, k_steps, z + r * z_pitch + v0 + v, z_pitch, k > 0);
        }
      }
    }
  }
}

// ---- from products to logits

// tanh to about 2 ulp: an odd polynomial, fitted to the least relative error on [0, 0.625], then exponentials.
PK_INLINE F tanh_vector(F x) {
  const F t = (F)((U)x & 0x7fffffffu), q = t * t;
  F p = splat(-5.7170447e-3f);
  p = fma(p, q, splat(2.06505861e-2f));
  p = fma(p, q, splat(-5.37434965e-2f));
  p = fma(p, q, splat(1.33314908e-1f));
  p = fma(p, q, splat(-3.33332837e-1f));
  const F near = fma(t * q, p, t);
  const F e = exp_nonpositive(t * -2.f);
  const F far = (1.f - e) / (1.f + e);
  const U is_near = (U)(t < splat(0.625f));
  const U y = ((U)near & is_near) | ((U)far & ~is_near);
  return (F)(y | ((U)x & 0x80000000u));
}

// z = cap(scale * (z + bias)) of one row, in place. bias is null or n items of T. z has room for n rounded up to W.
template <class T>
static void finish(float* z, int64_t n, const void* bias_, float softcap, float scale) {
  const auto* bias = (const typename T::Item*)bias_;
  for (int64_t i = 0; i < n; i += W) {
    F x = *(F_any*)(z + i);
    if (bias && n - i >= W) {
      x += T::load(bias + i);
    } else if (bias) {
      typename T::Item items[W] = {};
      __builtin_memcpy(items, bias + i, (n - i) * sizeof *bias);
      x += T::load(items);
    }
    x *= scale;
    if (softcap > 0.f) x = softcap * tanh_vector(x / softcap);
    *(F_any*)(z + i) = x;
  }
}

static const HeadKernels& kernels(int dtype) {
  static constexpr HeadKernels table[] = {{product<Float32>, finish<Float32>},
                                          {product<Float16>, finish<Float16>},
                                          {product<BFloat16>, finish<BFloat16>}};
  return table[dtype];
}

#undef PK_INLINE
