// The most similar target of each candidate: the first step of merging and of parent offsets.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "ragged.h"
#include "row_kernels.h"
#include "rows.h"
#include "tensor.h"

namespace cropr {

// Targets, which are kept, and candidates, each of which is matched to a target: ascending
// positions of x (B, N, D).
struct MatchedLists {
  const char *target_name, *candidate_name;
  Tensor targets, candidates;  // contiguous
  const int64_t *target_pos, *candidate_pos;
  int64_t batch, n, num_targets, num_candidates, num_prefix;

  // The two lists are the second and the third input of the op.
  MatchedLists(
      const Op& op, const Dims& dims, const Tensor& target_idx, const Tensor& candidate_idx,
      int64_t prefix)
      : target_name(op.inputs[1].name),
        candidate_name(op.inputs[2].name),
        targets(torch::stable::contiguous(target_idx)),
        candidates(torch::stable::contiguous(candidate_idx)),
        target_pos(data<int64_t>(targets)),
        candidate_pos(data<int64_t>(candidates)),
        batch(dims['B']),
        n(dims['N']),
        num_targets(target_idx.size(1)),
        num_candidates(candidate_idx.size(1)),
        num_prefix(prefix) {
    const std::string names = std::string(target_name) + " and " + candidate_name;
    check_positions_once(
        op, names.c_str(), target_pos, num_targets, candidate_pos, num_candidates, batch, n);
    check_ascending(op, target_name, target_pos, num_targets);
    check_ascending(op, candidate_name, candidate_pos, num_candidates);
  }

  ImageLists image(int64_t b) const {
    return {
        target_pos + b * num_targets, candidate_pos + b * num_candidates, num_targets,
        num_candidates, 0};
  }

  // Raises an error if no target is left after the prefix: candidates are matched to those only.
  void require_target(const Op& op) const {
    if (num_targets == num_prefix)
      fail(
          name_of(op), ": ", target_name, " must hold a token after the prefix, got ",
          op.inputs[1].shape[1], " = num_prefix = ", num_prefix);
  }

 private:
  void check_ascending(
      const Op& op, const char* name, const int64_t* positions, int64_t count) const {
    for (int64_t b = 0; b < batch; ++b, positions += count)
      for (int64_t i = 1; i < count; ++i)
        if (positions[i - 1] > positions[i])
          fail(
              name_of(op), ": ", name, " must be ascending, got ", positions[i - 1], " before ",
              positions[i], " in image ", b);
  }
};

// The most similar target of each candidate after the prefix, by cosine, as its index in the list,
// and that similarity, both (B, num_candidates). Of equal targets the lower position wins; NaN is
// the lowest similarity. Lists are MatchedLists or RaggedRows: candidates that an image does not
// have are left out.
template <typename T, typename Lists>
void find_nearest(
    const Rows<T>& features, const Lists& lists, int64_t* nearest, double* similarities) {
  using A = acc_t<T>;
  constexpr int64_t kBatch = 16;  // candidates that share one pass over the targets
  const int64_t dim = features.dim, groups = (lists.num_candidates + kBatch - 1) / kBatch;
  if (groups == 0) return;
  torch::stable::parallel_for(0, lists.batch * groups, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> rows(kBatch * dim);
    Scratch<A> wide(dim);
    const auto norm = [&](const T* row) {
      A square;
      widen_row<T>(row, dim, wide.data());
      dot_rows<T>(row, dim, 1, dim, wide.data(), &square);
      return std::sqrt(square);
    };
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / groups, first = task % groups * kBatch;
      const ImageLists matched = lists.image(b);
      const int64_t count = std::min(kBatch, matched.num_candidates - first);
      const T* image = features.image(b);
      for (int64_t r = 0; r < count; ++r)
        std::copy_n(
            image + matched.candidate(first + r) * features.stride_n, dim, rows.data() + r * dim);
      A best[kBatch], products[kBatch];
      std::fill_n(best, kBatch, -std::numeric_limits<A>::infinity());
      int64_t* best_idx = nearest + b * lists.num_candidates + first;
      std::fill_n(best_idx, std::max<int64_t>(count, 0), lists.num_prefix);
      const int64_t num_targets = count > 0 ? matched.num_targets : 0;
      for (int64_t i = lists.num_prefix; i < num_targets; ++i) {
        const T* row = image + matched.target(i) * features.stride_n;
        const A length = norm(row);
        dot_rows<T>(rows.data(), dim, count, dim, wide.data(), products);
        for (int64_t r = 0; r < count; ++r) {
          const A similarity = products[r] / length;
          if (similarity > best[r]) best[r] = similarity, best_idx[r] = i;  // never for NaN
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        const A similarity = best[r] / norm(rows.data() + r * dim);
        similarities[b * lists.num_candidates + first + r] =
            std::isnan(similarity) ? -std::numeric_limits<double>::infinity() : similarity;
      }
    }
  });
}

}  // namespace cropr
