// Draws without a random number: twin of sage_policies/hashing.py.
#pragma once

#include <cstdint>

namespace sage {

// 64 well-mixed bits: one step of SplitMix64.
inline std::uint64_t mix(std::uint64_t bits) {
  bits += 0x9E3779B97F4A7C15u;
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return bits ^ (bits >> 31);
}

// What a replica draws for a prefix, below 2^52; the lowest is where the prefix should be cached.
inline std::uint64_t draw(std::int64_t prefix, std::int64_t replica) {
  return mix(mix(static_cast<std::uint64_t>(prefix)) ^ static_cast<std::uint64_t>(replica)) >> 12;
}

}  // namespace sage
