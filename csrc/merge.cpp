// CPU kernels of cropr::merge and merge_: pruned tokens are merged into their most similar targets.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

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

// The kept tokens, the pruned ones, and the kept row that each pruned token is merged into.
struct Assignment {
  int64_t* kept;              // (B, num_keep), ascending positions
  int64_t* pruned;            // (B, num_prune), ascending positions
  std::vector<int64_t> rows;  // (B, num_prune): index among the kept tokens
};

// Prunes the candidates of lowest cost (B, C); of equal costs the higher position.
void choose_targets(
    const Partition& partition, const int64_t* nearest, const double* costs,
    Assignment& assignment) {
  assignment.rows.resize(partition.batch * partition.num_prune);
  std::vector<int64_t> order(partition.num_candidates), row_of_position(partition.n);
  std::vector<bool> is_pruned(partition.num_candidates);
  for (int64_t b = 0; b < partition.batch; ++b) {
    const int64_t* candidates = partition.candidate_pos + b * partition.num_candidates;
    const int64_t* targets = partition.target_pos + b * partition.num_targets;
    const double* cost = costs + b * partition.num_candidates;
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
      return cost[i] != cost[j] ? cost[i] < cost[j] : i > j;
    });
    is_pruned.assign(partition.num_candidates, false);
    for (int64_t r = 0; r < partition.num_prune; ++r) is_pruned[order[r]] = true;
    int64_t *kept = assignment.kept + b * partition.num_keep,
            *pruned = assignment.pruned + b * partition.num_prune;
    for (int64_t i = 0, c = 0, row = 0; row < partition.num_keep;) {
      while (c < partition.num_candidates && is_pruned[c]) ++c;
      const bool is_target = c == partition.num_candidates ||
                             (i < partition.num_targets && targets[i] < candidates[c]);
      kept[row] = is_target ? targets[i++] : candidates[c++];
      row_of_position[kept[row]] = row;
      ++row;
    }
    for (int64_t c = 0, r = 0; c < partition.num_candidates; ++c) {
      if (!is_pruned[c]) continue;
      assignment.rows[b * partition.num_prune + r] =
          row_of_position[targets[nearest[b * partition.num_candidates + c]]];
      pruned[r++] = candidates[c];
    }
  }
}

// Replaces similarities (B, C) by costs max(1 - similarity, 0) * cost_scale (B, N), a scale of 1 if
// absent; NaN becomes the highest cost.
template <typename A>
void similarities_to_costs(
    const Partition& partition, const OptionalTensor& cost_scale, double* similarities) {
  const Tensor dense = cost_scale ? torch::stable::contiguous(*cost_scale) : partition.candidates;
  const float* scale = cost_scale ? data<float>(dense) : nullptr;
  for (int64_t i = 0; i < partition.batch * partition.num_candidates; ++i) {
    A cost = std::max(A(1) - static_cast<A>(similarities[i]), A(0));
    if (scale != nullptr)
      cost *= scale[i / partition.num_candidates * partition.n + partition.candidate_pos[i]];
    similarities[i] = std::isnan(cost) ? std::numeric_limits<double>::infinity() : cost;
  }
}

void assign(
    const Tensor& x, const Partition& partition, const OptionalTensor& cost_scale,
    Assignment& assignment) {
  const Tensor dense = with_dense_rows(x);
  std::vector<int64_t> nearest(partition.batch * partition.num_candidates, partition.num_prefix);
  std::vector<double> similarities(nearest.size());
  with_float_type(dense.scalar_type(), [&](auto tag) {
    if (partition.num_prune == 0) return;
    find_nearest(Rows<decltype(tag)>(dense), partition, nearest.data(), similarities.data());
    similarities_to_costs<acc_t<decltype(tag)>>(partition, cost_scale, similarities.data());
  });
  choose_targets(partition, nearest.data(), similarities.data(), assignment);
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
// output_row(b, row) is where it is written.
template <typename T, typename OutputRow>
void combine(
    const Rows<T>& x, const Partition& partition, const Assignment& assignment, const float* sizes,
    float* kept_sizes, const OutputRow& output_row) {
  using A = acc_t<T>;
  parallel_for(0, partition.batch, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> sum(x.dim), target(x.dim);
    const auto square = [&](const A* row) {
      A result;
      dot_rows<A>(row, x.dim, 1, x.dim, row, &result);
      return result;
    };
    for (int64_t b = begin; b < end; ++b) {
      const int64_t *kept = assignment.kept + b * partition.num_keep,
                    *pruned = assignment.pruned + b * partition.num_prune;
      const int64_t* rows = assignment.rows.data() + b * partition.num_prune;
      const float* size = sizes + b * partition.n;
      float* total = kept_sizes + b * partition.num_keep;
      for (int64_t i = 0; i < partition.num_keep; ++i) total[i] = size[kept[i]];
      std::vector<bool> is_written(partition.num_keep, false);
      for (int64_t r = 0; r < partition.num_prune; ++r) {
        const int64_t row = rows[r];
        if (is_written[row]) continue;
        is_written[row] = true;
        std::fill_n(sum.data(), x.dim, A(0));
        const auto add = [&](int64_t position) {
          const A weight = size[position];
          weighted_sum<T>(
              x.image(b) + position * x.stride_n, x.stride_n, 1, x.dim, &weight, sum.data());
        };
        add(kept[row]);
        for (int64_t s = r; s < partition.num_prune; ++s) {
          if (rows[s] != row) continue;
          add(pruned[s]);
          total[row] += size[pruned[s]];
        }
        const A merged_size = total[row];
        for (int64_t d = 0; d < x.dim; ++d) sum.data()[d] /= merged_size;
        widen_row<T>(x.image(b) + kept[row] * x.stride_n, x.dim, target.data());
        const A factor = norm_factor(square(target.data()), square(sum.data()));
        T* out = output_row(b, row);  // in place: the target's row of x
        for (int64_t d = 0; d < x.dim; ++d) store_one(out + d, sum.data()[d] * factor);
      }
    }
  });
}

// Subtracts from each pruned row of x (B, N, D) the row it is merged into.
template <typename T>
void subtract_merged(T* x, int64_t dim, const Partition& partition, const Assignment& assignment) {
  parallel_for(
      0, partition.batch * partition.num_prune, row_grain(dim), [&](int64_t begin, int64_t end) {
        Scratch<acc_t<T>> scratch(2 * dim);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / partition.num_prune;
          T* image = x + b * partition.n * dim;
          const T* merged =
              image + assignment.kept[b * partition.num_keep + assignment.rows[i]] * dim;
          subtract_row<T>(image + assignment.pruned[i] * dim, merged, dim, scratch.data());
        }
      });
}

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
  Assignment assignment{kept_idx.data<int64_t>(), pruned_idx.data<int64_t>(), {}};
  assign(x, partition, cost_scale, assignment);
  int64_t* row_of = dest.data<int64_t>();
  for (int64_t b = 0; b < partition.batch; ++b) {
    for (int64_t i = 0; i < num_keep; ++i)
      row_of[b * partition.n + assignment.kept[b * num_keep + i]] = i;
    for (int64_t r = 0; r < num_prune; ++r)
      row_of[b * partition.n + assignment.pruned[b * num_prune + r]] =
          assignment.rows[b * num_prune + r];
  }
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> rows(dense);
    T* out = kept.data<T>();
    parallel_for(0, partition.batch * num_keep, row_grain(dim), [&](int64_t begin, int64_t end) {
      for_each_image_range(begin, end, num_keep, [&](int64_t b, int64_t first, int64_t last) {
        gather_rows(
            rows.image(b), rows.stride_n, dim, assignment.kept + b * num_keep, first, last,
            out + b * num_keep * dim,
            RowCopy(0));  // the merged rows are overwritten next
      });
    });
    combine(
        rows, partition, assignment, data<float>(weights), kept_sizes.data<float>(),
        [&](int64_t b, int64_t row) { return out + (b * num_keep + row) * dim; });
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
  Assignment assignment{kept_idx.data<int64_t>(), pruned_idx.data<int64_t>(), {}};
  assign(x, partition, cost_scale, assignment);
  float *size = mutable_data<float>(sizes), *total = kept_sizes.data<float>();
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* rows = mutable_data<T>(x);
    combine(Rows<T>(x), partition, assignment, size, total, [&](int64_t b, int64_t row) {
      return rows + (b * partition.n + assignment.kept[b * num_keep + row]) * x.size(2);
    });
    if (offsets) subtract_merged(rows, x.size(2), partition, assignment);
  });
  int64_t* parents = mutable_data<int64_t>(parent);
  for (int64_t b = 0; b < partition.batch; ++b) {
    const int64_t* kept = assignment.kept + b * num_keep;
    for (int64_t i = 0; i < num_keep; ++i)
      size[b * partition.n + kept[i]] = total[b * num_keep + i];
    for (int64_t r = 0; r < partition.num_prune; ++r)
      parents[b * partition.n + assignment.pruned[b * partition.num_prune + r]] =
          kept[assignment.rows[b * partition.num_prune + r]];
  }
  return {kept_idx.release(), pruned_idx.release(), kept_sizes.release()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cropr, CPU, library) {
  library.impl("merge", TORCH_BOX(&merge));
  library.impl("merge_", TORCH_BOX(&merge_));
}

}  // namespace cropr
