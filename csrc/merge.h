// Pruned tokens and the kept ones that they are merged into, for equal and for ragged images.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ragged.h"
#include "tensor.h"

namespace cropr {

// One image after a merge: positions, or with first_row = b * N rows of x.view(B * N, D).
struct ImageMerge {
  int64_t *kept, *pruned;  // ascending
  int64_t* rows;           // of each pruned token: index in kept of the one it is merged into
  float* sizes;            // of the kept tokens
  int64_t num_kept, num_pruned, first_row;

  int64_t kept_position(int64_t i) const {
    return kept[i] - first_row;
  }
  int64_t pruned_position(int64_t r) const {
    return pruned[r] - first_row;
  }
  int64_t target_position(int64_t r) const {
    return kept_position(rows[r]);
  }
};

// Fills the lists of an image: kept are its targets and those candidates that is_pruned does not
// mark; candidate c is merged into the target at position target_of(c). row_of_position is scratch
// for N.
template <typename Targets>
void split_lists(
    const ImageLists& lists, const std::vector<bool>& is_pruned, const Targets& target_of,
    std::vector<int64_t>& row_of_position, const ImageMerge& merge) {
  for (int64_t i = 0, c = 0, row = 0; row < merge.num_kept;) {
    while (c < lists.num_candidates && is_pruned[c]) ++c;
    const bool is_target = c == lists.num_candidates ||
                           (i < lists.num_targets && lists.targets[i] < lists.candidates[c]);
    merge.kept[row] = is_target ? lists.targets[i++] : lists.candidates[c++];
    row_of_position[merge.kept_position(row)] = row;
    ++row;
  }
  for (int64_t c = 0, r = 0; c < lists.num_candidates; ++c) {
    if (!is_pruned[c]) continue;
    merge.rows[r] = row_of_position[target_of(c)];
    merge.pruned[r++] = lists.candidates[c];
  }
}

// Replaces similarities (B, C) by costs max(1 - similarity, 0) * cost_scale (B, N), a scale of 1 if
// absent; NaN becomes the highest cost.
template <typename A, typename Lists>
void similarities_to_costs(
    const Lists& lists, const OptionalTensor& cost_scale, double* similarities) {
  OptionalTensor dense;
  if (cost_scale) dense = torch::stable::contiguous(*cost_scale);
  const float* scale = dense ? data<float>(*dense) : nullptr;
  for (int64_t b = 0; b < lists.batch; ++b) {
    const ImageLists matched = lists.image(b);
    double* costs = similarities + b * lists.num_candidates;
    for (int64_t c = 0; c < matched.num_candidates; ++c) {
      A cost = std::max(A(1) - static_cast<A>(costs[c]), A(0));
      if (scale != nullptr) cost *= scale[b * lists.n + matched.candidate(c)];
      costs[c] = std::isnan(cost) ? std::numeric_limits<double>::infinity() : cost;
    }
  }
}

// Merges in place: rows of x, sizes and parents; with offsets pruned rows become their offsets from
// the rows that they are merged into.
void merge_in_place(
    const Tensor& x, const std::vector<ImageMerge>& merges, const Tensor& sizes,
    const Tensor& parent, bool offsets);

}  // namespace cropr
