// The vector code of mass.h, for one instruction set. mass.cpp includes this file once per instruction set, each
// time inside another namespace and target region, so there is no include guard; nothing from the standard
// library may be used here (an inline function of it, compiled for AVX-512, could be the copy the linker keeps).
//
// mass.cpp defines before including: PK_WIDTH (floats per vector), PK_ISA (0 baseline, 2 AVX2, 5 AVX-512).

#define PK_INLINE static inline __attribute__((always_inline))

constexpr int W = PK_WIDTH;
constexpr int GROUP = 4 * W;  // four independent accumulators hide the latency of an addition
constexpr int GROUPS = TILE / GROUP;

typedef float F __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef double D __attribute__((vector_size(W * 8)));
typedef uint16_t H __attribute__((vector_size(W * 2)));
typedef float F_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t H_any __attribute__((vector_size(W * 2), aligned(2), may_alias));

constexpr float MINUS_INF = -__builtin_inff();

PK_INLINE F splat(float x) { return F{} + x; }

PK_INLINE F fma(F a, F b, F c) {
#if PK_ISA == 5
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif PK_ISA == 2
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// A NaN in b is returned, one in a is not (what maxps does, so this is one instruction).
PK_INLINE F max_keep_b(F a, F b) { return a > b ? a : b; }

// Bit i is set where lane i of v equals x.
PK_INLINE uint32_t lanes_equal(F v, float x) {
#if PK_ISA == 5
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(x), _CMP_EQ_OQ);
#elif PK_ISA == 2
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(x), _CMP_EQ_OQ));
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpeq_ps((__m128)v, _mm_set1_ps(x)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= uint32_t(v[i] == x) << i;
  return bits;
#endif
}

PK_INLINE float horizontal_max(F v) {
  float x[W];
  __builtin_memcpy(x, &v, sizeof v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
}

PK_INLINE float horizontal_sum(F v) {
  float x[W];
  __builtin_memcpy(x, &v, sizeof v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// exp(x) for x <= 0, within 1 ulp; 0 below -87.33 (the smallest normal float) and at -inf; NaN for NaN.
// exp(0) is exactly 1. Two-step argument reduction, since x*log2(e) alone loses the digits of a large |x|.
PK_INLINE F exp_nonpositive(F x) {
#if PK_ISA == 5
  x = (F)_mm512_max_ps(_mm512_set1_ps(-104.f), (__m512)x);  // so that -inf gives no NaN; exp(-104) rounds to 0
#endif
  const F magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const F t = fma(x, splat(1.44269504f), magic);
  const F n = t - magic;
  F r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F p = splat(1.38145406e-3f);
  p = fma(p, r, splat(8.36874545e-3f));
  p = fma(p, r, splat(4.1668389e-2f));
  p = fma(p, r, splat(1.66665211e-1f));
  p = fma(p, r, splat(0.49999994f));
  p = fma(p, r, splat(1.f));
  p = fma(p, r, splat(1.f));
#if PK_ISA == 5
  return (F)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const F scale = (F)(((U)t << 23) + 0x3f800000u);
  return (F)((I)(p * scale) & ~(x < splat(-87.33f)));  // the negated comparison lets NaN through
#endif
}

// exp(beta*x) where e = exp(x). Small integers by multiplication: no second exponential.
template <int POWER>
PK_INLINE F tempered(F e, F x, float beta) {
  if constexpr (POWER == 0) return exp_nonpositive(x * beta);
  else if constexpr (POWER == 1) return e;
  else if constexpr (POWER % 2 == 0) { const F h = tempered<POWER / 2>(e, x, beta); return h * h; }
  else return tempered<POWER - 1>(e, x, beta) * e;
}

// Loads of one vector as fp32, per dtype.
struct Float32 {
  typedef float Item;
  static constexpr Item LOWEST = MINUS_INF;
  PK_INLINE F load(const Item* p) { return (F) * (const F_any*)p; }
};
struct BFloat16 {
  typedef uint16_t Item;
  static constexpr Item LOWEST = 0xff80;
  PK_INLINE F load(const Item* p) { return (F)(__builtin_convertvector((H) * (const H_any*)p, U) << 16); }
};
struct Float16 {
  typedef uint16_t Item;
  static constexpr Item LOWEST = 0xfc00;
  PK_INLINE F load(const Item* p) {
#if PK_ISA == 5
    // With a mask of ones: the plain form reads an uninitialised register in GCC's header, and warns of it.
    return (F)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif PK_ISA == 2
    return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    const U h = __builtin_convertvector((H) * (const H_any*)p, U);
    const U sign = (h & 0x8000u) << 16, body = (h & 0x7fffu) << 13;
    const U special = (U)((I)body >= (I)(U{} + 0x0f800000u)), tiny = (U)((I)body < (I)(U{} + 0x00800000u));
    const U normal = body + (112u << 23) + (special & (112u << 23));
    // A subnormal half: its bits as the mantissa under 2^-14, then that one subtracted. No subnormal float occurs.
    const U small = (U)((F)(body + (113u << 23)) - (F)(U{} + (113u << 23)));
    return (F)(sign | (tiny & small) | (~tiny & normal));
#endif
  }
};

// A tile in the cache: its logits as fp32, padded with -inf to whole groups.
struct Staged {
  alignas(64) float z[TILE];
  F running_max[GROUPS];  // after each group, so that the argmax is found without a second pass over the tile
  int groups;
  float max;
};

template <class T>
PK_INLINE void stage_group(Staged& s, int g, const typename T::Item* p, F& running) {
  const F a = T::load(p), b = T::load(p + W), c = T::load(p + 2 * W), d = T::load(p + 3 * W);
  F* z = (F*)(s.z + g * GROUP);
  z[0] = a, z[1] = b, z[2] = c, z[3] = d;
  running = max_keep_b(max_keep_b(max_keep_b(a, b), max_keep_b(c, d)), running);
  s.running_max[g] = running;
}

template <class T>
PK_INLINE void stage(Staged& s, const typename T::Item* p, int64_t n, int64_t skip) {
  typedef typename T::Item Item;
  const int whole = n / GROUP;
  F running = splat(MINUS_INF);
  int g = 0;
  const int skip_group = skip < 0 ? -1 : skip / GROUP;
  for (; g < whole; ++g) {
    if (g == skip_group) {
      Item items[GROUP];
      __builtin_memcpy(items, p + g * GROUP, sizeof items);
      items[skip - g * GROUP] = T::LOWEST;
      stage_group<T>(s, g, items, running);
    } else {
      stage_group<T>(s, g, p + g * GROUP, running);
    }
  }
  if (const int rest = n - whole * GROUP; rest) {
    Item items[GROUP];
    for (int i = 0; i < GROUP; ++i) items[i] = T::LOWEST;
    __builtin_memcpy(items, p + g * GROUP, rest * sizeof(Item));
    if (g == skip_group) items[skip - g * GROUP] = T::LOWEST;
    stage_group<T>(s, g++, items, running);
  }
  s.groups = g;
  s.max = horizontal_max(running);
}

// Replaces the first entry that equals the maximum by -inf: it then adds nothing to any sum.
PK_INLINE void drop_argmax(Staged& s) {
  int g = 0;
  while (g < s.groups && !lanes_equal(s.running_max[g], s.max)) ++g;
  if (g == s.groups) return;  // only NaN
  for (float* z = s.z + g * GROUP; z < s.z + (g + 1) * GROUP; z += W)
    if (const uint32_t bits = lanes_equal(*(F*)z, s.max)) {
      z[__builtin_ctz(bits)] = MINUS_INF;
      return;
    }
}

// The sums over a staged tile, while the first-level cache also fetches what lies at `next`.
template <int POWER, bool MOMENT>
static void sums(const Staged& s, float beta, const char* next, int next_bytes, TileMass& out) {
  F r1[4] = {}, rb[4] = {}, moment[4] = {};
  const F max = splat(s.max == MINUS_INF ? 0.f : s.max);  // -inf - -inf would be NaN
  for (int g = 0; g < s.groups; ++g) {
    const F* z = (const F*)(s.z + g * GROUP);
    __builtin_prefetch(next);
    for (int line = 64; line < next_bytes; line += 64) __builtin_prefetch(next + line);
    next += next_bytes;
    for (int i = 0; i < 4; ++i) {
      const F x = z[i] - max;
      const F e = exp_nonpositive(x);
      r1[i] += e;
      rb[i] += tempered<POWER>(e, x, beta);
      if constexpr (MOMENT) moment[i] += e * max_keep_b(splat(-104.f), x);  // where e = 0, -inf * 0 would be NaN
    }
  }
  out.max = s.max;
  out.r1 = horizontal_sum((r1[0] + r1[1]) + (r1[2] + r1[3]));
  out.rb = horizontal_sum((rb[0] + rb[1]) + (rb[2] + rb[3]));
  out.moment = MOMENT ? horizontal_sum((moment[0] + moment[1]) + (moment[2] + moment[3])) : 0.f;
}

typedef void (*Sums)(const Staged&, float, const char*, int, TileMass&);

template <bool MOMENT>
static Sums sums_for(float beta) {
  constexpr Sums table[] = {sums<0, MOMENT>, sums<1, MOMENT>, sums<2, MOMENT>, sums<3, MOMENT>, sums<4, MOMENT>,
                            sums<5, MOMENT>, sums<6, MOMENT>, sums<7, MOMENT>, sums<8, MOMENT>};
  return beta >= 1.f && beta <= 8.f && beta == (float)(int)beta ? table[(int)beta] : table[0];
}

PK_INLINE void infinite_tile(const Staged& s, TileMass& out) {
  float nan = 0.f;
  for (int i = 0; i < s.groups * GROUP; ++i)
    if (s.z[i] != s.z[i]) nan = s.z[i];
  out = {s.max, nan, 0.f, 0.f};
}

// Results below the smallest normal float become 0, here and in `draw` alike. Powers of small masses produce them by
// the thousand, and on some processors each costs a hundred cycles.
struct FlushSubnormals {
#if defined(__SSE2__)
  unsigned saved = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(saved | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved); }
#else
  FlushSubnormals() {}
#endif
};

// A subnormal beta would count as 0 under FlushSubnormals, and 0 * -inf is NaN. No row tells it from the least normal
// one unless its logits are 1e30 apart.
PK_INLINE float normal(float beta) { return beta < __FLT_MIN__ ? __FLT_MIN__ : beta; }

template <class T>
static void mass(const void* row, int64_t V, int64_t first, int64_t last, float beta, bool entropy,
                 TileMass* slots) {
  typedef typename T::Item Item;
  beta = normal(beta);
  const FlushSubnormals flush;
  const Sums run = entropy ? sums_for<true>(beta) : sums_for<false>(beta);
  Staged s;
  for (int64_t t = first; t < last; ++t) {
    const Item* p = (const Item*)row + t * TILE;
    const int64_t left = V - t * TILE;
    stage<T>(s, p, left < TILE ? left : TILE, -1);
    TileMass out;
    if (s.max == -MINUS_INF) {
      infinite_tile(s, out);
    } else {
      drop_argmax(s);
      run(s, beta, (const char*)(p + TILE), GROUP * sizeof(Item), out);
    }
    __builtin_memcpy(slots + t, &out, sizeof out);  // the workspace is only aligned to floats
  }
}

template <class T>
static TileMass mass_without(const void* tile, int64_t n, int64_t skip, float beta) {
  beta = normal(beta);
  const FlushSubnormals flush;
  Staged s;
  stage<T>(s, (const typename T::Item*)tile, n, skip);
  drop_argmax(s);
  TileMass out;
  sums_for<false>(beta)(s, beta, (const char*)tile, 0, out);
  return out;
}

template <int POWER>
static void masses_in_place(Staged& s, float beta) {
  const F max = splat(s.max);
  for (F* z = (F*)s.z; z < (F*)(s.z + s.groups * GROUP); ++z) {
    const F x = *z - max;
    *z = tempered<POWER>(POWER ? exp_nonpositive(x) : x, x, beta);
  }
}

template <class T>
static int64_t draw(const void* tile, int64_t n, int64_t skip, float beta, double fraction) {
  beta = normal(beta);
  const FlushSubnormals flush;
  Staged s;
  stage<T>(s, (const typename T::Item*)tile, n, skip);
  if (s.max == MINUS_INF) return -1;
  typedef void (*Masses)(Staged&, float);
  constexpr Masses table[] = {masses_in_place<0>, masses_in_place<1>, masses_in_place<2>,
                              masses_in_place<3>, masses_in_place<4>, masses_in_place<5>,
                              masses_in_place<6>, masses_in_place<7>, masses_in_place<8>};
  (beta >= 1.f && beta <= 8.f && beta == (float)(int)beta ? table[(int)beta] : table[0])(s, beta);
  double before[GROUPS + 1];  // the CDF before each group
  before[0] = 0;
  for (int g = 0; g < s.groups; ++g) {
    const F* z = (const F*)(s.z + g * GROUP);
    const D d = (__builtin_convertvector(z[0], D) + __builtin_convertvector(z[1], D)) +
                (__builtin_convertvector(z[2], D) + __builtin_convertvector(z[3], D));
    double sum = 0;
    for (int i = 0; i < W; ++i) sum += d[i];
    before[g + 1] = before[g] + sum;
  }
  const double target = fraction * before[s.groups];
  int g = 0;
  while (g + 1 < s.groups && !(before[g + 1] > target)) ++g;
  double cdf = before[g];
  int64_t last = -1;
  for (int i = g * GROUP; i < s.groups * GROUP; ++i) {
    if (!(s.z[i] > 0)) continue;
    cdf += s.z[i];
    last = i;
    if (cdf > target) return i;
  }
  // Rounding left the target at or above the end: the last entry that has mass.
  for (int i = g * GROUP - 1; last < 0 && i >= 0; --i)
    if (s.z[i] > 0) last = i;
  return last;
}

template <class T>
static float logit(const void* row, int64_t v) {
  typename T::Item items[W];
  for (int i = 0; i < W; ++i) items[i] = ((const typename T::Item*)row)[v];
  return T::load(items)[0];
}

template <class T>
constexpr MassKernels kernels_of = {mass<T>, mass_without<T>, draw<T>, logit<T>};

static const MassKernels& kernels(int dtype) {
  static constexpr MassKernels table[] = {kernels_of<Float32>, kernels_of<Float16>, kernels_of<BFloat16>};
  return table[dtype];
}

#undef PK_INLINE
