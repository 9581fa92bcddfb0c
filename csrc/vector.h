// Vectors of floats for one instruction set: arithmetic, the exponential, loads of every dtype. mass_kernel.h and
// lm_head_kernel.h include this file once per instruction set, each time inside another namespace and target region, so
// there is no include guard; nothing from the standard library may be used here (an inline function of it, compiled for
// AVX-512, could be the copy the linker keeps).
//
// Defined before including: PK_WIDTH (floats per vector), PK_ISA (0 baseline, 2 AVX2, 5 AVX-512).

#define PK_INLINE static inline __attribute__((always_inline))

constexpr int W = PK_WIDTH;

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

// Bit i is set where entry i of v equals x.
PK_INLINE uint32_t entries_equal(F v, float x) {
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

// Doubles that fill one register, and the floats and integers that go with them.
constexpr int W64 = W / 2;
typedef double F64 __attribute__((vector_size(W64 * 8)));
typedef int64_t I64 __attribute__((vector_size(W64 * 8)));
typedef float F64_floats __attribute__((vector_size(W64 * 4), may_alias));

PK_INLINE F64 fma(F64 a, F64 b, F64 c) {
#if PK_ISA == 5
  return (F64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif PK_ISA == 2
  return (F64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (F64)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// exp(x) for x <= 0, within 2 ulp; 0 below -708 (about the smallest normal double) and at -inf; exp(0) is exactly 1.
PK_INLINE F64 exp_nonpositive(F64 x) {
  const F64 zero{}, least = zero - 708.0;
  const I64 normal = x >= least;
  x = x < least ? least : x;
  const F64 magic = zero + 0x1.8p52;  // adding it rounds to the nearest integer, which the low bits then hold
  const F64 t = fma(x, zero + 0x1.71547652b82fep0, magic);
  const F64 n = t - magic;
  // log 2 in two parts, of which n times the first is exact.
  const F64 r = fma(n, zero - 0x1.a39ef35793c76p-33, fma(n, zero - 0x1.62e42fee00000p-1, x));
  // The series of exp up to r^13 / 13!, |r| < 0.35: what is left out is below 1e-17.
  F64 p = zero + 1.0 / 6227020800.0;
  p = fma(p, r, zero + 1.0 / 479001600.0);
  p = fma(p, r, zero + 1.0 / 39916800.0);
  p = fma(p, r, zero + 1.0 / 3628800.0);
  p = fma(p, r, zero + 1.0 / 362880.0);
  p = fma(p, r, zero + 1.0 / 40320.0);
  p = fma(p, r, zero + 1.0 / 5040.0);
  p = fma(p, r, zero + 1.0 / 720.0);
  p = fma(p, r, zero + 1.0 / 120.0);
  p = fma(p, r, zero + 1.0 / 24.0);
  p = fma(p, r, zero + 1.0 / 6.0);
  p = fma(p, r, zero + 0.5);
  p = fma(p, r, zero + 1.0);
  p = fma(p, r, zero + 1.0);
  const F64 scale = (F64)(((I64)t << 52) + 0x3ff0000000000000);
  return (F64)((I64)(p * scale) & normal);
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
