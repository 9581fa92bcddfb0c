// The instruction set that the vector code uses on this machine.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace power_kernels {

enum Isa { BASELINE, AVX2, AVX512, AVX512_BF16 };

inline Isa instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  // For tests and measurements: a lower instruction set than the machine's.
  if (const char* wish = std::getenv("POWER_KERNELS_CPU")) {
    if (!std::strcmp(wish, "baseline")) return BASELINE;
    if (!std::strcmp(wish, "avx2") && has_avx2) return AVX2;
    if (!std::strcmp(wish, "avx512") && has_avx512) return AVX512;
  }
  return has_bf16 ? AVX512_BF16 : has_avx512 ? AVX512 : has_avx2 ? AVX2 : BASELINE;
#else
  return BASELINE;
#endif
}

}  // namespace power_kernels
