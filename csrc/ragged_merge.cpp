// CPU kernels of cropr::ragged_nearest and ragged_merge_.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "merge.h"
#include "nearest.h"
#include "ragged.h"
#include "rows.h"
#include "tensor.h"

namespace cropr {
namespace {

using torch::stable::parallel_for;

std::tuple<Returned, Returned> ragged_nearest(
    const Tensor& x, const Tensor& order, const Tensor& starts, int64_t num_candidates,
    int64_t num_prefix, const OptionalTensor& cost_scale) {
  constexpr const Op& op = op_named("ragged_nearest");
  const Dims dims =
      check(op, {&x, &order, &starts, ptr_or_null(cost_scale)}, {num_prefix, num_candidates});
  const RaggedRows active(op, dims, order, starts, num_candidates, num_prefix);
  active.check_order(op);
  const Tensor dense = with_dense_rows(x);
  Output nearest({active.batch, num_candidates}, ScalarType::Long);
  int64_t* target_row = nearest.data<int64_t>();
  std::vector<double> similarities(active.batch * num_candidates);
  const bool is_double = x.scalar_type() == ScalarType::Double;
  Output costs({active.batch, num_candidates}, is_double ? ScalarType::Double : ScalarType::Float);
  with_float_type(x.scalar_type(), [&](auto tag) {
    using A = acc_t<decltype(tag)>;
    find_nearest(Rows<decltype(tag)>(dense), active, target_row, similarities.data());
    similarities_to_costs<A>(active, cost_scale, similarities.data());
    A* cost = costs.data<A>();
    for (int64_t b = 0; b < active.batch; ++b) {
      const ImageLists lists = active.image(b);
      for (int64_t c = 0; c < num_candidates; ++c) {
        const bool exists = c < lists.num_candidates;
        const int64_t i = b * num_candidates + c;
        cost[i] = exists ? static_cast<A>(similarities[i]) : std::numeric_limits<A>::infinity();
        target_row[i] = exists ? lists.targets[target_row[i]] : -1;
      }
    }
  });
  return {costs.release(), nearest.release()};
}

// Raises an error unless every pruned candidate exists and its target is one of the image, after
// the prefix; returns the number of pruned candidates of each image.
std::vector<int64_t> count_pruned(
    const Op& op, const RaggedRows& active, const bool* prune, const int64_t* nearest) {
  std::vector<int64_t> counts(active.batch, 0);
  for (int64_t b = 0; b < active.batch; ++b) {
    const ImageLists lists = active.image(b);
    for (int64_t c = 0; c < active.num_candidates; ++c) {
      if (!prune[b * active.num_candidates + c]) continue;
      if (c >= lists.num_candidates)
        fail(
            name_of(op), ": prune must be false past the ", lists.num_candidates,
            " candidates of image ", b, ", got true at ", c);
      const int64_t row = nearest[b * active.num_candidates + c];
      if (!std::binary_search(
              lists.targets + active.num_prefix, lists.targets + lists.num_targets, row))
        fail(
            name_of(op), ": nearest must be a target of image ", b,
            " after the prefix where prune is true, got ", row, " at ", c);
      ++counts[b];
    }
  }
  return counts;
}

std::tuple<Returned, Returned, Returned> ragged_merge_(
    Tensor x, const Tensor& order, const Tensor& starts, const Tensor& prune, const Tensor& nearest,
    Tensor sizes, Tensor parent, int64_t num_kept, int64_t num_prefix, bool offsets) {
  constexpr const Op& op = op_named("ragged_merge_");
  const Dims dims =
      check(op, {&x, &order, &starts, &prune, &nearest, &sizes, &parent}, {num_prefix, num_kept});
  const RaggedRows active(op, dims, order, starts, dims['C'], num_prefix);
  active.check_order(op);
  const Tensor dense_prune = torch::stable::contiguous(prune),
               dense_nearest = torch::stable::contiguous(nearest);
  const bool* marks = data<bool>(dense_prune);
  const int64_t* targets = data<int64_t>(dense_nearest);
  const std::vector<int64_t> counts = count_pruned(op, active, marks, targets);
  const int64_t num_pruned = std::accumulate(counts.begin(), counts.end(), int64_t(0));
  if (num_kept != active.num_rows - num_pruned)
    fail(
        "ragged_merge_: num_kept must be T - prune.sum() = ", active.num_rows - num_pruned,
        ", got ", num_kept);
  Output rows({num_kept}, ScalarType::Long), new_starts({active.batch + 1}, ScalarType::Long),
      new_sizes({num_kept}, ScalarType::Float);
  std::vector<int64_t> pruned(num_pruned), target_rows(num_pruned);
  std::vector<ImageMerge> merges;
  int64_t* start = new_starts.data<int64_t>();
  start[0] = 0;
  for (int64_t b = 0, first_pruned = 0; b < active.batch; first_pruned += counts[b++]) {
    start[b + 1] = start[b] + active.count(b) - counts[b];
    merges.push_back(
        {rows.data<int64_t>() + start[b], pruned.data() + first_pruned,
         target_rows.data() + first_pruned, new_sizes.data<float>() + start[b],
         start[b + 1] - start[b], counts[b], b * active.n});
  }
  parallel_for(0, active.batch, row_grain(16 * active.n), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> row_of_position(active.n);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * active.num_candidates;
      const std::vector<bool> is_pruned(marks + first, marks + first + active.num_candidates);
      const auto target_of = [&](int64_t c) { return targets[first + c] - b * active.n; };
      split_lists(active.image(b), is_pruned, target_of, row_of_position, merges[b]);
    }
  });
  merge_in_place(x, merges, sizes, parent, offsets);
  return {rows.release(), new_starts.release(), new_sizes.release()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cropr, CPU, library) {
  library.impl("ragged_nearest", TORCH_BOX(&ragged_nearest));
  library.impl("ragged_merge_", TORCH_BOX(&ragged_merge_));
}

}  // namespace cropr
