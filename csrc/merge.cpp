// CPU kernels of cropr::merge and merge_: pruned tokens are merged into the most similar safe ones.
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

// The safe tokens and the candidates for pruning, as ascending positions of x (B, N, D); num_keep of both are kept.
struct Partition : Lists {
  int64_t num_keep, num_prune;

  Partition(
      const Op& op, const Dims& dims, const Tensor& safe_idx, const Tensor& candidate_idx, int64_t keep, int64_t prefix)
      : Lists(op, dims, safe_idx, candidate_idx, prefix), num_keep(keep), num_prune(num_safe + num_candidates - keep) {
    if (num_prune > 0) require_target(op);
  }
};

// Which tokens are pruned, and into which they are merged.
struct Plan {
  int64_t* kept;               // (B, num_keep), ascending positions
  int64_t* pruned;             // (B, num_prune), ascending positions
  std::vector<int64_t> slots;  // (B, num_prune): the row of kept that each of them goes into
};

// The candidates that cost least are pruned; of equals the higher position. costs are those of candidates, (B, C).
void choose_targets(const Partition& partition, const int64_t* nearest, const double* costs, Plan& plan) {
  plan.slots.resize(partition.batch * partition.num_prune);
  std::vector<int64_t> order(partition.num_candidates), slot_of(partition.n);
  std::vector<bool> is_pruned(partition.num_candidates);
  for (int64_t b = 0; b < partition.batch; ++b) {
    const int64_t* candidates = partition.candidate_pos + b * partition.num_candidates;
    const int64_t* safe = partition.safe_pos + b * partition.num_safe;
    const double* cost = costs + b * partition.num_candidates;
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
      return cost[i] != cost[j] ? cost[i] < cost[j] : i > j;
    });
    is_pruned.assign(partition.num_candidates, false);
    for (int64_t r = 0; r < partition.num_prune; ++r) is_pruned[order[r]] = true;
    int64_t *kept = plan.kept + b * partition.num_keep, *pruned = plan.pruned + b * partition.num_prune;
    for (int64_t i = 0, c = 0, slot = 0; slot < partition.num_keep;) {
      while (c < partition.num_candidates && is_pruned[c]) ++c;
      const bool from_safe = c == partition.num_candidates || (i < partition.num_safe && safe[i] < candidates[c]);
      kept[slot] = from_safe ? safe[i++] : candidates[c++];
      slot_of[kept[slot]] = slot;
      ++slot;
    }
    for (int64_t c = 0, r = 0; c < partition.num_candidates; ++c) {
      if (!is_pruned[c]) continue;
      plan.slots[b * partition.num_prune + r] = slot_of[safe[nearest[b * partition.num_candidates + c]]];
      pruned[r++] = candidates[c];
    }
  }
}

// What it costs to prune each candidate, (B, C), in place of its similarity to the nearest safe token: max(1 -
// similarity, 0) * its cost among `costs` (B, N), one without them; NaN is the highest.
template <typename A>
void costs_of_similarities(const Partition& partition, const OptionalTensor& costs, double* similarities) {
  const Tensor dense = costs ? torch::stable::contiguous(*costs) : partition.candidates;
  const float* own = costs ? data<float>(dense) : nullptr;
  for (int64_t i = 0; i < partition.batch * partition.num_candidates; ++i) {
    A cost = std::max(A(1) - static_cast<A>(similarities[i]), A(0));
    if (own != nullptr) cost *= own[i / partition.num_candidates * partition.n + partition.candidate_pos[i]];
    similarities[i] = std::isnan(cost) ? std::numeric_limits<double>::infinity() : cost;
  }
}

void make_plan(const Tensor& x, const Partition& partition, const OptionalTensor& costs, Plan& plan) {
  const Tensor dense = with_dense_rows(x);
  std::vector<int64_t> nearest(partition.batch * partition.num_candidates, partition.num_prefix);
  std::vector<double> similarities(nearest.size());
  with_float_type(dense.scalar_type(), [&](auto tag) {
    if (partition.num_prune == 0) return;
    find_nearest(Rows<decltype(tag)>(dense), partition, nearest.data(), similarities.data());
    costs_of_similarities<acc_t<decltype(tag)>>(partition, costs, similarities.data());
  });
  choose_targets(partition, nearest.data(), similarities.data(), plan);
}

// sqrt(own) / sqrt(mean), of sums of squares: what gives a mean the norm of its target. 1 where the mean has none, or
// one that does not fit.
template <typename A>
A norm_factor(A own, A mean) {
  constexpr A infinity = std::numeric_limits<A>::infinity();
  const A factor = std::sqrt(own) / std::sqrt(mean);
  return mean > 0 && mean < infinity && factor < infinity ? factor : A(1);
}

// mean = (size * x + sum of those merged into it) / (size + sum of their sizes), and kept[slot] = mean * |x| / |mean|,
// rounded once, for every slot that a pruned token goes into. `written(b, slot)` is where that row goes.
template <typename T, typename Written>
void combine(
    const Rows<T>& x, const Partition& partition, const Plan& plan, const float* sizes, float* kept_sizes,
    const Written& written) {
  using A = acc_t<T>;
  parallel_for(0, partition.batch, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> sum(x.dim), own(x.dim);
    const auto square = [&](const A* row) {
      A result;
      dot_rows<A>(row, x.dim, 1, x.dim, row, &result);
      return result;
    };
    for (int64_t b = begin; b < end; ++b) {
      const int64_t *kept = plan.kept + b * partition.num_keep, *pruned = plan.pruned + b * partition.num_prune;
      const int64_t* slots = plan.slots.data() + b * partition.num_prune;
      const float* size = sizes + b * partition.n;
      float* total = kept_sizes + b * partition.num_keep;
      for (int64_t i = 0; i < partition.num_keep; ++i) total[i] = size[kept[i]];
      std::vector<bool> done(partition.num_keep, false);
      for (int64_t r = 0; r < partition.num_prune; ++r) {
        const int64_t slot = slots[r];
        if (done[slot]) continue;
        done[slot] = true;
        std::fill_n(sum.data(), x.dim, A(0));
        const auto add = [&](int64_t position) {
          const A weight = size[position];
          weighted_sum<T>(x.image(b) + position * x.stride_n, x.stride_n, 1, x.dim, &weight, sum.data());
        };
        add(kept[slot]);
        for (int64_t other = r; other < partition.num_prune; ++other) {
          if (slots[other] != slot) continue;
          add(pruned[other]);
          total[slot] += size[pruned[other]];
        }
        const A whole = total[slot];
        for (int64_t d = 0; d < x.dim; ++d) sum.data()[d] /= whole;
        widen_row<T>(x.image(b) + kept[slot] * x.stride_n, x.dim, own.data());
        const A factor = norm_factor(square(own.data()), square(sum.data()));
        T* row = written(b, slot);  // in place, where x was
        for (int64_t d = 0; d < x.dim; ++d) store_one(row + d, sum.data()[d] * factor);
      }
    }
  });
}

// Each pruned row of x (B, N, D) becomes what it was less the row it went into.
template <typename T>
void subtract_merged(T* x, int64_t dim, const Partition& partition, const Plan& plan) {
  parallel_for(0, partition.batch * partition.num_prune, row_grain(dim), [&](int64_t begin, int64_t end) {
    Scratch<acc_t<T>> scratch(2 * dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / partition.num_prune;
      T* image = x + b * partition.n * dim;
      const T* merged = image + plan.kept[b * partition.num_keep + plan.slots[i]] * dim;
      subtract_row<T>(image + plan.pruned[i] * dim, merged, dim, scratch.data());
    }
  });
}

std::tuple<Returned, Returned, Returned, Returned, Returned> merge(
    const Tensor& x, const Tensor& safe_idx, const Tensor& candidate_idx, const Tensor& sizes, int64_t num_keep,
    int64_t num_prefix, const OptionalTensor& costs) {
  constexpr const Op& op = op_named("merge");
  const Dims dims = check(op, {&x, &safe_idx, &candidate_idx, &sizes, given(costs)}, {num_prefix, num_keep});
  if (dims['S'] + dims['C'] != dims['N'])
    fail(
        "merge: safe_idx and candidate_idx must together hold N = ", dims['N'], " positions, got ", dims['S'], " + ",
        dims['C']);
  const Partition partition(op, dims, safe_idx, candidate_idx, num_keep, num_prefix);
  const int64_t dim = x.size(2), num_prune = partition.num_prune;
  const Tensor dense = with_dense_rows(x), weights = torch::stable::contiguous(sizes);
  Output kept({partition.batch, num_keep, dim}, x.scalar_type());
  Output kept_idx({partition.batch, num_keep}, ScalarType::Long),
      pruned_idx({partition.batch, num_prune}, ScalarType::Long);
  Output kept_sizes({partition.batch, num_keep}, ScalarType::Float);
  Output dest({partition.batch, partition.n}, ScalarType::Long);
  Plan plan{kept_idx.data<int64_t>(), pruned_idx.data<int64_t>(), {}};
  make_plan(x, partition, costs, plan);
  int64_t* row_of = dest.data<int64_t>();
  for (int64_t b = 0; b < partition.batch; ++b) {
    for (int64_t i = 0; i < num_keep; ++i) row_of[b * partition.n + plan.kept[b * num_keep + i]] = i;
    for (int64_t r = 0; r < num_prune; ++r)
      row_of[b * partition.n + plan.pruned[b * num_prune + r]] = plan.slots[b * num_prune + r];
  }
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> rows(dense);
    T* out = kept.data<T>();
    parallel_for(0, partition.batch * num_keep, row_grain(dim), [&](int64_t begin, int64_t end) {
      for_each_image_range(begin, end, num_keep, [&](int64_t b, int64_t first, int64_t last) {
        gather_rows(
            rows.image(b), rows.stride_n, dim, plan.kept + b * num_keep, first, last, out + b * num_keep * dim,
            RowCopy(0));  // merged ones are written over some of them next
      });
    });
    combine(rows, partition, plan, data<float>(weights), kept_sizes.data<float>(), [&](int64_t b, int64_t slot) {
      return out + (b * num_keep + slot) * dim;
    });
  });
  return {kept.release(), kept_idx.release(), pruned_idx.release(), kept_sizes.release(), dest.release()};
}

std::tuple<Returned, Returned, Returned> merge_(
    Tensor x, const Tensor& safe_idx, const Tensor& candidate_idx, Tensor sizes, Tensor parent, int64_t num_keep,
    int64_t num_prefix, bool offsets, const OptionalTensor& costs) {
  constexpr const Op& op = op_named("merge_");
  const Dims dims = check(op, {&x, &safe_idx, &candidate_idx, &sizes, &parent, given(costs)}, {num_prefix, num_keep});
  const Partition partition(op, dims, safe_idx, candidate_idx, num_keep, num_prefix);
  Output kept_idx({partition.batch, num_keep}, ScalarType::Long);
  Output pruned_idx({partition.batch, partition.num_prune}, ScalarType::Long);
  Output kept_sizes({partition.batch, num_keep}, ScalarType::Float);
  Plan plan{kept_idx.data<int64_t>(), pruned_idx.data<int64_t>(), {}};
  make_plan(x, partition, costs, plan);
  float *size = mutable_data<float>(sizes), *total = kept_sizes.data<float>();
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* rows = mutable_data<T>(x);
    combine(Rows<T>(x), partition, plan, size, total, [&](int64_t b, int64_t slot) {
      return rows + (b * partition.n + plan.kept[b * num_keep + slot]) * x.size(2);
    });
    if (offsets) subtract_merged(rows, x.size(2), partition, plan);
  });
  int64_t* into = mutable_data<int64_t>(parent);
  for (int64_t b = 0; b < partition.batch; ++b) {
    const int64_t* kept = plan.kept + b * num_keep;
    for (int64_t i = 0; i < num_keep; ++i) size[b * partition.n + kept[i]] = total[b * num_keep + i];
    for (int64_t r = 0; r < partition.num_prune; ++r)
      into[b * partition.n + plan.pruned[b * partition.num_prune + r]] = kept[plan.slots[b * partition.num_prune + r]];
  }
  return {kept_idx.release(), pruned_idx.release(), kept_sizes.release()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cropr, CPU, library) {
  library.impl("merge", TORCH_BOX(&merge));
  library.impl("merge_", TORCH_BOX(&merge_));
}

}  // namespace cropr
