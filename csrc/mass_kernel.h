// The vector code of mass.h, for one instruction set. mass.cpp includes this file once per instruction set, each
// time inside another namespace and target region, so there is no include guard. See vector.h.

#include "vector.h"

constexpr int GROUP = 4 * W;  // four independent accumulators hide the latency of an addition
constexpr int GROUPS = TILE / GROUP;

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
  while (g < s.groups && !entries_equal(s.running_max[g], s.max)) ++g;
  if (g == s.groups) return;  // only NaN
  for (float* z = s.z + g * GROUP; z < s.z + (g + 1) * GROUP; z += W)
    if (const uint32_t bits = entries_equal(*(F*)z, s.max)) {
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

// The power that stands for exp(beta x): beta where it is one of 1, 2, ... 16, else 0.
PK_INLINE int power_of(float beta) { return beta >= 1.f && beta <= 16.f && beta == (float)(int)beta ? (int)beta : 0; }

template <bool MOMENT>
static Sums sums_for(float beta) {
  constexpr Sums table[] = {sums<0, MOMENT>,  sums<1, MOMENT>,  sums<2, MOMENT>,  sums<3, MOMENT>,  sums<4, MOMENT>,
                            sums<5, MOMENT>,  sums<6, MOMENT>,  sums<7, MOMENT>,  sums<8, MOMENT>,  sums<9, MOMENT>,
                            sums<10, MOMENT>, sums<11, MOMENT>, sums<12, MOMENT>, sums<13, MOMENT>, sums<14, MOMENT>,
                            sums<15, MOMENT>, sums<16, MOMENT>};
  return table[power_of(beta)];
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
  constexpr Masses table[] = {masses_in_place<0>,  masses_in_place<1>,  masses_in_place<2>,  masses_in_place<3>,
                              masses_in_place<4>,  masses_in_place<5>,  masses_in_place<6>,  masses_in_place<7>,
                              masses_in_place<8>,  masses_in_place<9>,  masses_in_place<10>, masses_in_place<11>,
                              masses_in_place<12>, masses_in_place<13>, masses_in_place<14>, masses_in_place<15>,
                              masses_in_place<16>};
  table[power_of(beta)](s, beta);
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

// ---- float64: a tile is copied as fp32 to z, from which the caller takes what it leaves out, and then summed.
// z is padded with -inf to TILE entries; entries [0, n) may have mass.

template <class T>
static void copy(const void* tile, int64_t n, float* z) {
  const typename T::Item* p = (const typename T::Item*)tile;
  int64_t i = 0;
  for (; i + W <= n; i += W) *(F_any*)(z + i) = T::load(p + i);
  if (i < n) {
    typename T::Item items[W];
    for (int j = 0; j < W; ++j) items[j] = T::LOWEST;
    __builtin_memcpy(items, p + i, (n - i) * sizeof(items[0]));
    *(F_any*)(z + i) = T::load(items);
    i += W;
  }
  for (; i < TILE; i += W) *(F_any*)(z + i) = splat(MINUS_INF);
}

static int64_t argmax(const float* z, int64_t n) {
  F top = splat(MINUS_INF);
  for (int64_t i = 0; i < n; i += W) top = max_keep_b(*(const F_any*)(z + i), top);
  const float max = horizontal_max(top);
  for (int64_t i = 0; i < n; i += W)
    if (const uint32_t bits = entries_equal(*(const F_any*)(z + i), max)) return i + __builtin_ctz(bits);
  return 0;  // only NaN
}

PK_INLINE F64 masses64(const float* z, double alpha, float max) {
  F64_floats part;
  __builtin_memcpy(&part, z, sizeof part);
  return exp_nonpositive((__builtin_convertvector(part, F64) - max) * alpha);
}

PK_INLINE double total(F64 masses) {
  double sum = 0;
  for (int i = 0; i < W64; ++i) sum += masses[i];
  return sum;
}

static double sum64(const float* z, int64_t n, double alpha, float max) {
  F64 sums[2] = {};
  for (int64_t i = 0; i < n; i += 2 * W64) {
    sums[0] += masses64(z + i, alpha, max);
    sums[1] += masses64(z + i + W64, alpha, max);
  }
  return total(sums[0] + sums[1]);
}

static int64_t search64(const float* z, int64_t n, double alpha, float max, double target) {
  double before = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; i += W64) {
    const F64 masses = masses64(z + i, alpha, max);
    const double after = before + total(masses);
    if (after > before) {
      double running = before;
      for (int j = 0; j < W64; ++j) {
        const double sum = running + masses[j];
        if (!(sum > running)) continue;
        running = sum;
        last = i + j;
        if (running > target) return last;
      }
    }
    before = after;
  }
  return last;
}

template <class T>
constexpr MassKernels kernels_of = {mass<T>, mass_without<T>, draw<T>, logit<T>, copy<T>, argmax, sum64, search64};

static const MassKernels& kernels(int dtype) {
  static constexpr MassKernels table[] = {kernels_of<Float32>, kernels_of<Float16>, kernels_of<BFloat16>};
  return table[dtype];
}

#undef PK_INLINE
