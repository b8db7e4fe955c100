// For each token of one list the most similar of another: what merging and the restoring of pruned tokens begin with.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "row_kernels.h"
#include "rows.h"
#include "tensor.h"

namespace cropr {

// Safe tokens, which stay, and candidates, each of which looks for a safe one: ascending positions of x (B, N, D).
struct Lists {
  const char *safe_name, *candidate_name;
  Tensor safe, candidates;  // contiguous
  const int64_t *safe_pos, *candidate_pos;
  int64_t batch, n, num_safe, num_candidates, num_prefix;

  // The two lists are the second and the third input of the op.
  Lists(const Op& op, const Dims& dims, const Tensor& safe_idx, const Tensor& candidate_idx, int64_t prefix)
      : safe_name(op.inputs[1].name),
        candidate_name(op.inputs[2].name),
        safe(torch::stable::contiguous(safe_idx)),
        candidates(torch::stable::contiguous(candidate_idx)),
        safe_pos(data<int64_t>(safe)),
        candidate_pos(data<int64_t>(candidates)),
        batch(dims['B']),
        n(dims['N']),
        num_safe(safe_idx.size(1)),
        num_candidates(candidate_idx.size(1)),
        num_prefix(prefix) {
    const std::string both = std::string(safe_name) + " and " + candidate_name;
    check_positions_once(op, both.c_str(), safe_pos, num_safe, candidate_pos, num_candidates, batch, n);
    check_ascending(op, safe_name, safe_pos, num_safe);
    check_ascending(op, candidate_name, candidate_pos, num_candidates);
  }

  // Some candidate looks for a safe token: there must be one.
  void require_target(const Op& op) const {
    if (num_safe == num_prefix)
      fail(
          name_of(op), ": ", safe_name, " must hold a token behind the prefix, got ", op.inputs[1].shape[1],
          " = num_prefix = ", num_prefix);
  }

 private:
  void check_ascending(const Op& op, const char* name, const int64_t* positions, int64_t count) const {
    for (int64_t b = 0; b < batch; ++b, positions += count)
      for (int64_t i = 1; i < count; ++i)
        if (positions[i - 1] > positions[i])
          fail(
              name_of(op), ": ", name, " must be ascending, got ", positions[i - 1], " before ", positions[i],
              " in image ", b);
  }
};

// For each candidate the most similar safe token behind the prefix, by the cosine of their features, as its index in
// the list, and how similar; the lower position of equals. NaN is the lowest similarity.
template <typename T>
void find_nearest(const Rows<T>& features, const Lists& lists, int64_t* nearest, double* similarities) {
  using A = acc_t<T>;
  constexpr int64_t kTogether = 16;  // candidates that share one pass over the safe tokens
  const int64_t dim = features.dim, groups = (lists.num_candidates + kTogether - 1) / kTogether;
  if (groups == 0) return;
  torch::stable::parallel_for(0, lists.batch * groups, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> rows(kTogether * dim);
    Scratch<A> wide(dim);
    const auto norm = [&](const T* row) {
      A square;
      widen_row<T>(row, dim, wide.data());
      dot_rows<T>(row, dim, 1, dim, wide.data(), &square);
      return std::sqrt(square);
    };
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / groups, first = task % groups * kTogether;
      const int64_t count = std::min(kTogether, lists.num_candidates - first);
      const T* image = features.image(b);
      const int64_t* from = lists.candidate_pos + b * lists.num_candidates + first;
      for (int64_t r = 0; r < count; ++r) std::copy_n(image + from[r] * features.stride_n, dim, rows.data() + r * dim);
      A best[kTogether], products[kTogether];
      std::fill_n(best, kTogether, -std::numeric_limits<A>::infinity());
      int64_t* mine = nearest + b * lists.num_candidates + first;
      std::fill_n(mine, count, lists.num_prefix);
      for (int64_t i = lists.num_prefix; i < lists.num_safe; ++i) {
        const T* row = image + lists.safe_pos[b * lists.num_safe + i] * features.stride_n;
        const A length = norm(row);
        dot_rows<T>(rows.data(), dim, count, dim, wide.data(), products);
        for (int64_t r = 0; r < count; ++r) {
          const A similarity = products[r] / length;
          if (similarity > best[r]) best[r] = similarity, mine[r] = i;  // never for NaN
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
