// Random numbers that are a function of a seed, a name and an index alone: the same on any number of threads, and a
// group or tensor keeps its own when others come or go.
#pragma once

#include <cstdint>
#include <string>

namespace rarefy::pruning {

/// The finalizer of splitmix64.
inline uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31U);
}

/// The key of a name, by FNV-1a.
inline uint64_t random_key(const std::string& name, uint64_t seed) {
  uint64_t key = 0xcbf29ce484222325U;
  for (const char c : name) {
    key = (key ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
  }
  return mixed(key ^ mixed(seed));
}

/// 64 random bits for an index.
inline uint64_t random_bits(uint64_t key, uint64_t index) { return mixed(key + (index + 1) * 0x9e3779b97f4a7c15U); }

}  // namespace rarefy::pruning
