// Exact top-k with a total order: value, then lower position first, NaN above everything.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace cropr {

// Bits of a float as an unsigned integer of the same order; -0.0 equals +0.0, every NaN is the maximum.
template <typename F>
CROPR_INLINE auto ordered_bits(F value) {
  using U = std::conditional_t<std::is_same_v<F, double>, uint64_t, uint32_t>;
  constexpr U sign = U(1) << (8 * sizeof(U) - 1);
  if (value != value) return ~U(0);
  value += F(0);  // -0.0 + 0.0 = +0.0
  U bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits ^ (U(-(bits >> (8 * sizeof(U) - 1))) | sign);  // negative: all bits flip; positive: only the sign
}

// The score's bits above the inverted position: one integer comparison decides value and tie.
template <typename F>
using select_key_t = std::conditional_t<std::is_same_v<F, double>, unsigned __int128, uint64_t>;

template <typename T>
CROPR_INLINE auto select_key(const T* scores, int64_t position) {
  using Key = select_key_t<acc_t<T>>;
  const auto inverted = static_cast<uint32_t>(~static_cast<uint32_t>(position));
  return (static_cast<Key>(ordered_bits(load_one(scores + position))) << 32) | inverted;
}

// Split positions 0..n-1 of one image into kept (num_keep) and pruned, both ascending.
template <typename T>
void select_image(
    const T* scores, int64_t n, int64_t num_keep, int64_t num_prefix, std::vector<select_key_t<acc_t<T>>>& keys,
    int64_t* kept, int64_t* pruned) {
  const int64_t wanted = num_keep - num_prefix;
  std::iota(kept, kept + num_prefix, int64_t(0));
  kept += num_prefix;
  if (num_keep == n) {
    std::iota(kept, kept + wanted, num_prefix);
    return;
  }
  if (wanted == 0) {
    std::iota(pruned, pruned + (n - num_prefix), num_prefix);
    return;
  }
  keys.resize(n - num_prefix);
  for (int64_t i = num_prefix; i < n; ++i) keys[i - num_prefix] = select_key(scores, i);
  const auto last = keys.begin() + (n - num_keep - 1);  // the largest key that leaves
  std::nth_element(keys.begin(), last, keys.end());
  const auto limit = *last;
  for (int64_t i = num_prefix; i < n; ++i) {
    if (select_key(scores, i) > limit)
      *kept++ = i;
    else
      *pruned++ = i;
  }
}

}  // namespace cropr
