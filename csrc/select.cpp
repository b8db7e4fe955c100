#include "select.h"

#include <cstring>
#include <numeric>

namespace cropr {
namespace {

// -0.0 equals +0.0; every NaN is the second largest key, as the largest is reserved for tokens of
// priority.
template <typename F>
CROPR_INLINE select_key_t<F> ordered_bits(F value) {
  using U = select_key_t<F>;
  constexpr U sign = U(1) << (8 * sizeof(U) - 1);
  const bool is_nan = value != value;
  value += F(0);  // -0.0 + 0.0 = +0.0
  U bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits ^=
      U(-(bits >> (8 * sizeof(U) - 1))) | sign;  // negative: all bits flip; positive: only the sign
  return is_nan ? ~U(0) - 1 : bits;
}

template <typename U>
struct Threshold {
  U key;         // larger keys are kept
  int64_t ties;  // number of kept keys that equal it, lowest positions first
};

// The count-th largest of n keys, 0 < count <= n, bit by bit from the top: each pass counts the
// keys that a larger threshold would keep. The counting has no branch and runs in vectors, where a
// partition would guess each comparison wrong half of the time. A threshold that keeps exactly
// count keys needs no further bits.
template <typename U>
CROPR_INLINE Threshold<U> find_threshold(const U* keys, int64_t n, int64_t count) {
  U threshold = 0;
  for (int bit = 8 * sizeof(U) - 1; bit >= 0; --bit) {
    const U candidate = threshold | U(1) << bit;
    U matches = 0;
    for (int64_t i = 0; i < n; ++i) matches += keys[i] >= candidate;
    const int64_t reached = static_cast<int64_t>(matches);
    if (reached >= count) threshold = candidate;
    if (reached == count) return {threshold - 1, 0};
  }
  U above = 0;
  for (int64_t i = 0; i < n; ++i) above += keys[i] > threshold;
  return {threshold, count - static_cast<int64_t>(above)};
}

// Puts priority before the score. If more tokens have priority than may be kept, their scores
// decide, and no other token is kept.
template <typename U>
CROPR_INLINE void prefer(U* keys, const int8_t* priority, int64_t n, int64_t count) {
  int64_t num_preferred = 0;
  for (int64_t i = 0; i < n; ++i) num_preferred += priority[i] > 0;
  const bool crowded = num_preferred > count;
  for (int64_t i = 0; i < n; ++i) {
    const U preferred = crowded ? keys[i] : ~U(0);
    const U ordinary = crowded || priority[i] < 0 ? U(0) : keys[i];
    keys[i] = priority[i] > 0 ? preferred : ordinary;
  }
}

template <typename T, typename U>
CROPR_INLINE Threshold<U> order_body(
    const T* scores, const int8_t* priority, int64_t n, int64_t count, U* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = ordered_bits(load_one(scores + i));
  if (priority != nullptr) prefer(keys, priority, n, count);
  return find_threshold(keys, n, count);
}

// target_clones cannot be put on a template, so each type gets a plain function around the inlined
// body.
#define CROPR_ORDER(T)                                                                            \
  CROPR_CLONES Threshold<select_key_t<T>> order(                                                  \
      const T* scores, const int8_t* priority, int64_t n, int64_t count, select_key_t<T>* keys) { \
    return order_body(scores, priority, n, count, keys);                                          \
  }
CROPR_ORDER(float)
CROPR_ORDER(double)
CROPR_ORDER(bfloat16)
CROPR_ORDER(float16)

}  // namespace

template <typename T>
void select_image(
    const T* scores, const int8_t* priority, int64_t n, int64_t num_keep, int64_t num_prefix,
    select_key_t<T>* keys, int64_t* kept, int64_t* pruned) {
  const int64_t count = num_keep - num_prefix, candidates = n - num_prefix;
  std::iota(kept, kept + num_prefix, int64_t(0));
  kept += num_prefix;
  if (count == candidates) {
    std::iota(kept, kept + count, num_prefix);
    return;
  }
  if (count == 0) {
    std::iota(pruned, pruned + candidates, num_prefix);
    return;
  }
  const int8_t* ranks = priority == nullptr ? nullptr : priority + num_prefix;
  auto [threshold, ties] = order(scores + num_prefix, ranks, candidates, count, keys);
  for (int64_t i = 0; i < candidates; ++i) {
    if (keys[i] > threshold || (keys[i] == threshold && ties-- > 0))
      *kept++ = num_prefix + i;
    else
      *pruned++ = num_prefix + i;
  }
}

#define CROPR_SELECT(T)          \
  template void select_image<T>( \
      const T*, const int8_t*, int64_t, int64_t, int64_t, select_key_t<T>*, int64_t*, int64_t*);
CROPR_SELECT(float)
CROPR_SELECT(double)
CROPR_SELECT(bfloat16)
CROPR_SELECT(float16)

}  // namespace cropr
