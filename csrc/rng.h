// The random-number contract in C++ (DESIGN section 4; power_kernels/rng.py is its specification).
//
//   key     = (seed & 0xffffffff, seed >> 32)
//   counter = (position, serial, chain_id, prompt_id << 3 | stream)
//   u0 = ((w0 >> 5) * 2^26 + (w1 >> 6)) * 2^-53,  u1 the same of w2, w3: 53 bits in [0, 1)
#pragma once

#include <cstdint>

namespace power_kernels {

constexpr uint32_t STREAM_BITS = 3;
constexpr uint32_t STREAM_POSITION = 0;  // u0 draws the token, u1 decides whether the current one is kept
constexpr uint32_t STREAM_STEP = 1;      // u0 draws the cut, u1 the acceptance through log(1 - u1)

struct Words {
  uint32_t w[4];
};

inline Words philox4x32_10(Words c, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c.w[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57} * c.w[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.w[1] ^ k0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.w[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

struct Uniforms {
  double u0, u1;
};

inline Uniforms uniforms(Words counter, uint64_t seed) {
  const Words c = philox4x32_10(counter, seed);
  const auto join = [](uint32_t high, uint32_t low) {
    return (static_cast<double>(high >> 5) * 67108864.0 + static_cast<double>(low >> 6)) * 0x1p-53;
  };
  return {join(c.w[0], c.w[1]), join(c.w[2], c.w[3])};
}

inline Words counter_words(uint32_t position, uint32_t serial, uint32_t chain_id, uint32_t prompt_id,
                           uint32_t stream) {
  return {{position, serial, chain_id, (prompt_id << STREAM_BITS) | stream}};
}

}  // namespace power_kernels
