// Exact top-k with a total order: value, then lower position first, NaN above everything.
#pragma once

#include <cstdint>
#include <type_traits>

#include "row_kernels.h"

namespace cropr {

// An unsigned integer that orders like the score.
template <typename T>
using select_key_t = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;

// Split positions 0..n-1 of one image into kept (num_keep) and pruned, both ascending. `keys` is
// scratch for n of them. priority may be null: positive tokens are kept before all others, negative
// ones pruned before all others.
template <typename T>
void select_image(
    const T* scores, const int8_t* priority, int64_t n, int64_t num_keep, int64_t num_prefix,
    select_key_t<T>* keys, int64_t* kept, int64_t* pruned);

}  // namespace cropr
