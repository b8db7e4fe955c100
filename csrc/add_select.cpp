// CPU kernels of cropr::add_select_ and ragged_add_select_: the residual add, then the selection by
// the scores of the new rows.
#include <algorithm>
#include <cmath>

#include "residual.h"
#include "row_kernels.h"
#include "rows.h"
#include "select.h"
#include "tensor.h"

namespace cropr {
namespace {

using torch::stable::parallel_for;

// The active tokens of one image: positions in it, null for all; or with first_row = b * N rows of
// x.view(B * N, D).
struct ActiveTokens {
  const int64_t* rows;
  int64_t count, first_row;

  int64_t row(int64_t i) const {
    return rows ? rows[i] : i;
  }
  int64_t position(int64_t i) const {
    return row(i) - first_row;
  }
};

// Sizes of tokens that raise scores, and the cost scales that scores are turned into, by position;
// null if absent.
struct Weights {
  const float* sizes;
  double size_weight;
  float* cost_scale;
  double cost_weight;

  Weights image(int64_t b, int64_t n) const {
    return {
        sizes ? sizes + b * n : nullptr, size_weight, cost_scale ? cost_scale + b * n : nullptr,
        cost_weight};
  }
};

// For the active tokens of one image: scores += size_weight * their standard deviation over the
// patches * log(size), and of patches the cost scale exp(cost_weight * (new score - mean) /
// standard deviation), 1 without a spread.
void weigh_scores(
    const ActiveTokens& tokens, int64_t num_prefix, const Weights& weights, float* scores) {
  constexpr double kMostExponent = 60;  // so that scales are finite and positive
  const int64_t patches = std::max<int64_t>(tokens.count - num_prefix, 1);
  double mean = 0, squares = 0;
  for (int64_t i = num_prefix; i < tokens.count; ++i) mean += scores[i];
  mean /= patches;
  for (int64_t i = num_prefix; i < tokens.count; ++i)
    squares += (scores[i] - mean) * (scores[i] - mean);
  const double deviation = std::sqrt(squares / patches), scale = weights.size_weight * deviation;
  if (weights.sizes != nullptr &&
      std::isfinite(scale)) {  // scores with NaN or infinity have no spread
    for (int64_t i = 0; i < tokens.count; ++i)
      scores[i] += static_cast<float>(
          scale * std::log(static_cast<double>(weights.sizes[tokens.position(i)])));
  }
  if (weights.cost_scale == nullptr) return;
  const bool has_spread = std::isfinite(deviation) && deviation > 0;
  for (int64_t i = num_prefix; i < tokens.count; ++i) {
    const double exponent = has_spread ? weights.cost_weight * (scores[i] - mean) / deviation : 0;
    weights.cost_scale[tokens.position(i)] =
        std::exp(static_cast<float>(std::clamp(exponent, -kMostExponent, kMostExponent)));
  }
}

// Adds the updates to their rows, and writes the scores of the new rows.
void add_and_score(
    Residual& residual, const Tensor& update, const OptionalTensor& gamma, const Tensor& query,
    float* scores) {
  const int64_t n = residual.n, count = residual.count, dim = residual.dim;
  with_update_types(residual, update, [&](auto tag, auto update_tag, const Tensor& updates) {
    using T = decltype(tag);
    add_rows<T, decltype(update_tag)>(
        residual, updates, gamma, [](int64_t, int64_t, const auto*) {});
    Scratch<acc_t<T>> folded(dim);
    fold_query(query, folded.data());
    const T* rows = data<T>(residual.x);
    const acc_t<T>* direction = folded.data();
    parallel_for(0, residual.batch * count, row_grain(dim), [&](int64_t begin, int64_t end) {
      for_each_image_range(begin, end, count, [&](int64_t b, int64_t first, int64_t last) {
        for (int64_t i = first; i < last;) {
          const int64_t run = residual.positions
                                  ? run_length(residual.positions + b * count, i, last)
                                  : last - first;
          score_rows<T>(
              rows + (b * n + residual.position(b, i)) * dim, dim, run, dim, direction,
              scores + b * count + i);
          i += run;
        }
      });
    });
  });
}

// What decides beside the scores which tokens are kept.
struct Selector {
  int64_t n, num_prefix;
  Priority ranks;
  Tensor dense_sizes;  // if it has any
  Weights weights;

  Selector(
      const Tensor& x, int64_t prefix, const OptionalTensor& sizes, double size_weight,
      const OptionalTensor& priority, const OptionalTensor& cost_scale, double cost_weight)
      : n(x.size(1)),
        num_prefix(prefix),
        ranks(priority, n),
        dense_sizes(sizes && size_weight != 0 ? torch::stable::contiguous(*sizes) : x),
        weights{
            sizes && size_weight != 0 ? data<float>(dense_sizes) : nullptr, size_weight,
            cost_scale ? mutable_data<float>(*cost_scale) : nullptr, cost_weight} {}

  // Splits the tokens of image b by their scores, which change to the size-adjusted ones. keys and
  // active_ranks are scratch for as many as there are tokens.
  void operator()(
      int64_t b, const ActiveTokens& tokens, int64_t num_keep, float* scores,
      select_key_t<float>* keys, int8_t* active_ranks, int64_t* kept, int64_t* pruned) const {
    if (weights.sizes != nullptr || weights.cost_scale != nullptr)
      weigh_scores(tokens, num_prefix, weights.image(b, n), scores);
    const int8_t* rank = ranks.image(b);
    if (rank != nullptr) {
      for (int64_t i = 0; i < tokens.count; ++i) active_ranks[i] = rank[tokens.position(i)];
      rank = active_ranks;
    }
    select_image(scores, rank, tokens.count, num_keep, num_prefix, keys, kept, pruned);
    for (int64_t i = 0; i < num_keep; ++i) kept[i] = tokens.row(kept[i]);
    for (int64_t i = 0; i < tokens.count - num_keep; ++i) pruned[i] = tokens.row(pruned[i]);
  }
};

std::tuple<Returned, Returned> add_select_(
    Tensor x, const OptionalTensor& idx, const Tensor& update, const OptionalTensor& gamma,
    const Tensor& query, int64_t num_keep, int64_t num_prefix, const OptionalTensor& sizes,
    double size_weight, const OptionalTensor& priority, const OptionalTensor& cost_scale,
    double cost_weight) {
  constexpr const Op& op = op_named("add_select_");
  const Dims dims = check(
      op,
      {&x, ptr_or_null(idx), &update, ptr_or_null(gamma), &query, ptr_or_null(sizes),
       ptr_or_null(priority), ptr_or_null(cost_scale)},
      {num_prefix, num_keep});
  Residual residual(op, dims, x, idx);
  const Selector select(x, num_prefix, sizes, size_weight, priority, cost_scale, cost_weight);
  const int64_t batch = residual.batch, count = residual.count, num_prune = count - num_keep;
  Output kept({batch, num_keep}, ScalarType::Long), pruned({batch, num_prune}, ScalarType::Long);
  int64_t *kept_pos = kept.data<int64_t>(), *pruned_pos = pruned.data<int64_t>();
  Scratch<float> values(batch * count);
  float* scores = values.data();
  add_and_score(residual, update, gamma, query, scores);
  parallel_for(0, batch, row_grain(16 * count), [&](int64_t begin, int64_t end) {
    Scratch<select_key_t<float>> keys(count);
    Scratch<int8_t> active_ranks(priority ? count : 0);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t* positions = residual.positions ? residual.positions + b * count : nullptr;
      select(
          b, {positions, count, 0}, num_keep, scores + b * count, keys.data(), active_ranks.data(),
          kept_pos + b * num_keep, pruned_pos + b * num_prune);
    }
  });
  return {kept.release(), pruned.release()};
}

Returned ragged_add_select_(
    Tensor x, const Tensor& rows, const Tensor& starts, const Tensor& update,
    const OptionalTensor& gamma, const Tensor& query, int64_t num_candidates, int64_t num_prefix,
    const OptionalTensor& sizes, double size_weight, const OptionalTensor& priority,
    const OptionalTensor& cost_scale, double cost_weight) {
  constexpr const Op& op = op_named("ragged_add_select_");
  const Dims dims = check(
      op,
      {&x, &rows, &starts, &update, ptr_or_null(gamma), &query, ptr_or_null(sizes),
       ptr_or_null(priority), ptr_or_null(cost_scale)},
      {num_prefix, num_candidates});
  const RaggedRows active(op, dims, rows, starts, num_candidates, num_prefix);
  Residual residual(op, x, active);
  const Selector select(x, num_prefix, sizes, size_weight, priority, cost_scale, cost_weight);
  Output order({active.num_rows}, ScalarType::Long);
  int64_t* order_rows = order.data<int64_t>();
  Scratch<float> values(active.num_rows);
  float* scores = values.data();
  add_and_score(residual, update, gamma, query, scores);
  parallel_for(0, active.batch, row_grain(16 * active.n), [&](int64_t begin, int64_t end) {
    Scratch<select_key_t<float>> keys(active.n);
    Scratch<int8_t> active_ranks(priority ? active.n : 0);
    for (int64_t b = begin; b < end; ++b) {
      const ImageLists lists = active.image(b);
      int64_t* targets = order_rows + active.start_data[b];
      select(
          b, {lists.targets, active.count(b), lists.first_row}, lists.num_targets,
          scores + active.start_data[b], keys.data(), active_ranks.data(), targets,
          targets + lists.num_targets);
    }
  });
  return order.release();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cropr, CPU, library) {
  library.impl("add_select_", TORCH_BOX(&add_select_));
  library.impl("ragged_add_select_", TORCH_BOX(&ragged_add_select_));
}

}  // namespace cropr
