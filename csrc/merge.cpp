// CPU kernels of cropr::merge and merge_: pruned tokens are merged into their most similar targets.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "merge.h"
#include "nearest.h"
#include "row_kernels.h"
#include "rows.h"
#include "tensor.h"

namespace cropr {
namespace {

using torch::stable::parallel_for;

// The targets and the candidates for pruning; num_keep of both together are kept.
struct Partition : MatchedLists {
  int64_t num_keep, num_prune;

  Partition(
      const Op& op, const Dims& dims, const Tensor& target_idx, const Tensor& candidate_idx,
      int64_t keep, int64_t prefix)
      : MatchedLists(op, dims, target_idx, candidate_idx, prefix),
        num_keep(keep),
        num_prune(num_targets + num_candidates - keep) {
    if (num_prune > 0) require_target(op);
  }
};

// Merges of all images whose lists of kept and of pruned tokens follow each other.
std::vector<ImageMerge> equal_merges(
    const Partition& partition, const Output& kept, const Output& pruned, const Output& kept_sizes,
    std::vector<int64_t>& rows) {
  rows.resize(partition.batch * partition.num_prune);
  int64_t *kept_idx = kept.data<int64_t>(), *pruned_idx = pruned.data<int64_t>();
  float* sizes = kept_sizes.data<float>();
  const int64_t num_keep = partition.num_keep, num_prune = partition.num_prune;
  std::vector<ImageMerge> merges;
  merges.reserve(partition.batch);
  for (int64_t b = 0; b < partition.batch; ++b)
    merges.push_back(
        {kept_idx + b * num_keep, pruned_idx + b * num_prune, rows.data() + b * num_prune,
         sizes + b * num_keep, num_keep, num_prune, 0});
  return merges;
}

// Prunes the candidates of lowest cost (B, C); of equal costs the higher position.
void choose_targets(
    const Partition& partition, const int64_t* nearest, const double* costs,
    const std::vector<ImageMerge>& merges) {
  std::vector<int64_t> order(partition.num_candidates), row_of_position(partition.n);
  std::vector<bool> is_pruned(partition.num_candidates);
  for (int64_t b = 0; b < partition.batch; ++b) {
    const ImageLists lists = partition.image(b);
    const int64_t* nearest_target = nearest + b * partition.num_candidates;
    const double* cost = costs + b * partition.num_candidates;
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
      return cost[i] != cost[j] ? cost[i] < cost[j] : i > j;
    });
    is_pruned.assign(partition.num_candidates, false);
    for (int64_t r = 0; r < partition.num_prune; ++r) is_pruned[order[r]] = true;
    const auto target_of = [&](int64_t c) { return lists.target(nearest_target[c]); };
    split_lists(lists, is_pruned, target_of, row_of_position, merges[b]);
  }
}

void assign(
    const Tensor& x, const Partition& partition, const OptionalTensor& cost_scale,
    const std::vector<ImageMerge>& merges) {
  const Tensor dense = with_dense_rows(x);
  std::vector<int64_t> nearest(partition.batch * partition.num_candidates, partition.num_prefix);
  std::vector<double> similarities(nearest.size());
  with_float_type(dense.scalar_type(), [&](auto tag) {
    if (partition.num_prune == 0) return;
    find_nearest(Rows<decltype(tag)>(dense), partition, nearest.data(), similarities.data());
    similarities_to_costs<acc_t<decltype(tag)>>(partition, cost_scale, similarities.data());
  });
  choose_targets(partition, nearest.data(), similarities.data(), merges);
}

// sqrt(target) / sqrt(mean), of sums of squares: the factor that gives a mean the norm of its
// target. 1 if the mean has no norm or the factor overflows.
template <typename A>
A norm_factor(A target, A mean) {
  constexpr A infinity = std::numeric_limits<A>::infinity();
  const A factor = std::sqrt(target) / std::sqrt(mean);
  return mean > 0 && mean < infinity && factor < infinity ? factor : A(1);
}

// mean = (size * x + sum of those merged into it) / (size + sum of their sizes), and kept[row] =
// mean * |x| / |mean|, rounded once, for every kept row that a pruned token is merged into.
// output_row(b, row) is where it is written. sizes are (B, N).
template <typename T, typename OutputRow>
void combine(
    const Rows<T>& x, const std::vector<ImageMerge>& merges, const float* sizes,
    const OutputRow& output_row) {
  using A = acc_t<T>;
  parallel_for(0, x.batch, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> sum(x.dim), target(x.dim);
    const auto square = [&](const A* row) {
      A result;
      dot_rows<A>(row, x.dim, 1, x.dim, row, &result);
      return result;
    };
    for (int64_t b = begin; b < end; ++b) {
      const ImageMerge& merge = merges[b];
      const float* size = sizes + b * x.count;
      for (int64_t i = 0; i < merge.num_kept; ++i) merge.sizes[i] = size[merge.kept_position(i)];
      std::vector<bool> is_written(merge.num_kept, false);
      for (int64_t r = 0; r < merge.num_pruned; ++r) {
        const int64_t row = merge.rows[r];
        if (is_written[row]) continue;
        is_written[row] = true;
        std::fill_n(sum.data(), x.dim, A(0));
        const auto add = [&](int64_t position) {
          const A weight = size[position];
          weighted_sum<T>(
              x.image(b) + position * x.stride_n, x.stride_n, 1, x.dim, &weight, sum.data());
        };
        add(merge.kept_position(row));
        for (int64_t s = r; s < merge.num_pruned; ++s) {
          if (merge.rows[s] != row) continue;
          add(merge.pruned_position(s));
          merge.sizes[row] += size[merge.pruned_position(s)];
        }
        const A merged_size = merge.sizes[row];
        for (int64_t d = 0; d < x.dim; ++d) sum.data()[d] /= merged_size;
        widen_row<T>(x.image(b) + merge.kept_position(row) * x.stride_n, x.dim, target.data());
        const A factor = norm_factor(square(target.data()), square(sum.data()));
        T* out = output_row(b, row);  // in place: the target's row of x
        for (int64_t d = 0; d < x.dim; ++d) store_one(out + d, sum.data()[d] * factor);
      }
    }
  });
}

}  // namespace

void merge_in_place(
    const Tensor& x, const std::vector<ImageMerge>& merges, const Tensor& sizes,
    const Tensor& parent, bool offsets) {
  const int64_t n = x.size(1), dim = x.size(2);
  float* size = mutable_data<float>(sizes);
  int64_t* parents = mutable_data<int64_t>(parent);
  std::vector<std::pair<int64_t, int64_t>> moves;  // rows of pruned tokens and of their targets
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* rows = mutable_data<T>(x);
    combine(Rows<T>(x), merges, size, [&](int64_t b, int64_t row) {
      return rows + (b * n + merges[b].kept_position(row)) * dim;
    });
    for (size_t b = 0; b < merges.size(); ++b) {
      const ImageMerge& merge = merges[b];
      const int64_t first = static_cast<int64_t>(b) * n;
      for (int64_t i = 0; i < merge.num_kept; ++i)
        size[first + merge.kept_position(i)] = merge.sizes[i];
      for (int64_t r = 0; r < merge.num_pruned; ++r) {
        parents[first + merge.pruned_position(r)] = merge.target_position(r);
        moves.emplace_back(first + merge.pruned_position(r), first + merge.target_position(r));
      }
    }
    if (!offsets) return;
    parallel_for(
        0, static_cast<int64_t>(moves.size()), row_grain(dim), [&](int64_t begin, int64_t end) {
          Scratch<acc_t<T>> scratch(2 * dim);
          for (int64_t i = begin; i < end; ++i)
            subtract_row<T>(
                rows + moves[i].first * dim, rows + moves[i].second * dim, dim, scratch.data());
        });
  });
}

namespace {

std::tuple<Returned, Returned, Returned, Returned, Returned> merge(
    const Tensor& x, const Tensor& target_idx, const Tensor& candidate_idx, const Tensor& sizes,
    int64_t num_keep, int64_t num_prefix, const OptionalTensor& cost_scale) {
  constexpr const Op& op = op_named("merge");
  const Dims dims = check(
      op, {&x, &target_idx, &candidate_idx, &sizes, ptr_or_null(cost_scale)},
      {num_prefix, num_keep});
  if (dims['T'] + dims['C'] != dims['N'])
    fail(
        "merge: target_idx and candidate_idx must together hold N = ", dims['N'],
        " positions, got ", dims['T'], " + ", dims['C']);
  const Partition partition(op, dims, target_idx, candidate_idx, num_keep, num_prefix);
  const int64_t dim = x.size(2), num_prune = partition.num_prune;
  const Tensor dense = with_dense_rows(x), weights = torch::stable::contiguous(sizes);
  Output kept({partition.batch, num_keep, dim}, x.scalar_type());
  Output kept_idx({partition.batch, num_keep}, ScalarType::Long),
      pruned_idx({partition.batch, num_prune}, ScalarType::Long);
  Output kept_sizes({partition.batch, num_keep}, ScalarType::Float);
  Output dest({partition.batch, partition.n}, ScalarType::Long);
  std::vector<int64_t> target_rows;
  const auto merges = equal_merges(partition, kept_idx, pruned_idx, kept_sizes, target_rows);
  assign(x, partition, cost_scale, merges);
  for (int64_t b = 0; b < partition.batch; ++b) {
    int64_t* row_of = dest.data<int64_t>() + b * partition.n;
    for (int64_t i = 0; i < num_keep; ++i) row_of[merges[b].kept[i]] = i;
    for (int64_t r = 0; r < num_prune; ++r) row_of[merges[b].pruned[r]] = merges[b].rows[r];
  }
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> rows(dense);
    T* out = kept.data<T>();
    parallel_for(0, partition.batch * num_keep, row_grain(dim), [&](int64_t begin, int64_t end) {
      for_each_image_range(begin, end, num_keep, [&](int64_t b, int64_t first, int64_t last) {
        gather_rows(
            rows.image(b), rows.stride_n, dim, merges[b].kept, first, last,
            out + b * num_keep * dim,
            RowCopy(0));  // the merged rows are overwritten next
      });
    });
    combine(rows, merges, data<float>(weights), [&](int64_t b, int64_t row) {
      return out + (b * num_keep + row) * dim;
    });
  });
  return {
      kept.release(), kept_idx.release(), pruned_idx.release(), kept_sizes.release(),
      dest.release()};
}

std::tuple<Returned, Returned, Returned> merge_(
    Tensor x, const Tensor& target_idx, const Tensor& candidate_idx, Tensor sizes, Tensor parent,
    int64_t num_keep, int64_t num_prefix, bool offsets, const OptionalTensor& cost_scale) {
  constexpr const Op& op = op_named("merge_");
  const Dims dims = check(
      op, {&x, &target_idx, &candidate_idx, &sizes, &parent, ptr_or_null(cost_scale)},
      {num_prefix, num_keep});
  const Partition partition(op, dims, target_idx, candidate_idx, num_keep, num_prefix);
  Output kept_idx({partition.batch, num_keep}, ScalarType::Long);
  Output pruned_idx({partition.batch, partition.num_prune}, ScalarType::Long);
  Output kept_sizes({partition.batch, num_keep}, ScalarType::Float);
  std::vector<int64_t> target_rows;
  const auto merges = equal_merges(partition, kept_idx, pruned_idx, kept_sizes, target_rows);
  assign(x, partition, cost_scale, merges);
  merge_in_place(x, merges, sizes, parent, offsets);
  return {kept_idx.release(), pruned_idx.release(), kept_sizes.release()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cropr, CPU, library) {
  library.impl("merge", TORCH_BOX(&merge));
  library.impl("merge_", TORCH_BOX(&merge_));
}

}  // namespace cropr
