// CPU kernels of the residual buffer: cropr::gather_norm, add_, add_norm_, add_select_ and rotate_.
#include <algorithm>
#include <cmath>

#include "row_kernels.h"
#include "rows.h"
#include "select.h"
#include "tensor.h"

namespace cropr {
namespace {

using torch::stable::parallel_for;

// The residual buffer x (B, N, D) and the K active tokens of each image: positions idx (B, K), or
// all N without idx.
struct Residual {
  Tensor x;
  OptionalTensor idx;  // contiguous
  const int64_t* positions =
      nullptr;  // data of idx: asking the tensor for it is a call into libtorch
  int64_t batch, n, count, dim;

  Residual(const Op& op, const Dims& dims, const Tensor& tensor, const OptionalTensor& active)
      : x(tensor), batch(dims['B']), n(dims['N']), count(dims['K']), dim(dims['D']) {
    if (!active) return;
    idx = torch::stable::contiguous(*active);
    positions = data<int64_t>(*idx);
    check_positions(op, "idx", positions, batch * count, n);
  }

  // Position in x of the i-th token of image b.
  int64_t position(int64_t b, int64_t i) const {
    return positions ? positions[b * count + i] : i;
  }
};

// An optional vector over the channels, in the accumulation type; null if absent.
template <typename A>
class Channels {
 public:
  explicit Channels(const OptionalTensor& vector)
      : values_(vector ? vector->size(0) : 0), exists_(vector.has_value()) {
    if (exists_) fold_query(*vector, values_.data());
  }
  const A* data() {
    return exists_ ? values_.data() : nullptr;
  }

 private:
  Scratch<A> values_;
  bool exists_;
};

// Adds every update to its row of the residual and calls after(b, i, wide) with the new row. T is
// the type of x, U that of the updates.
template <typename T, typename U, typename After>
void add_rows(
    Residual& residual, const Tensor& update, const OptionalTensor& gamma, const After& after) {
  using A = acc_t<T>;
  Channels<A> scale(gamma);
  T* x = mutable_data<T>(residual.x);
  const U* updates = data<U>(update);
  const int64_t n = residual.n, count = residual.count, dim = residual.dim;
  const A* factors = scale.data();
  parallel_for(0, residual.batch * count, row_grain(2 * dim), [&](int64_t begin, int64_t end) {
    Scratch<A> wide(dim), step(dim);
    for_each_image_range(begin, end, count, [&](int64_t b, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const U* update_row = updates + (b * count + i) * dim;
        const A* values;
        if constexpr (std::is_same_v<U, A>) {
          values = update_row;
        } else {
          widen_row<U>(update_row, dim, step.data());
          values = step.data();
        }
        add_row<T>(x + (b * n + residual.position(b, i)) * dim, values, factors, dim, wide.data());
        after(b, i, wide.data());
      }
    });
  });
}

// Calls body(T{}, U{}, update) with the types of the residual and of the updates; updates of
// another dtype than x are converted to the accumulation type first.
template <typename Body>
void with_update_types(const Residual& residual, const Tensor& update, const Body& body) {
  with_float_type(residual.x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Tensor dense = torch::stable::contiguous(update);
    if (update.scalar_type() == residual.x.scalar_type()) {
      body(tag, tag, dense);
    } else {
      constexpr auto wide =
          std::is_same_v<acc_t<T>, double> ? ScalarType::Double : ScalarType::Float;
      body(tag, acc_t<T>{}, dense.scalar_type() == wide ? dense : torch::stable::to(dense, wide));
    }
  });
}

Returned gather_norm(
    const Tensor& x, const OptionalTensor& idx, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, bool rms) {
  constexpr const Op& op = op_named("gather_norm");
  const Residual residual(
      op, check(op, {&x, ptr_or_null(idx), ptr_or_null(weight), ptr_or_null(bias)}), x, idx);
  const Tensor dense = with_dense_rows(x);
  Output out({residual.batch, residual.count, residual.dim}, x.scalar_type());
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> rows(dense);
    Channels<acc_t<T>> scale(weight), shift(bias);
    const Norm<acc_t<T>> norm{scale.data(), shift.data(), eps, rms};
    T* out_rows = out.data<T>();
    parallel_for(
        0, residual.batch * residual.count, row_grain(2 * residual.dim),
        [&](int64_t begin, int64_t end) {
          Scratch<acc_t<T>> wide(residual.dim);
          for_each_image_range(
              begin, end, residual.count, [&](int64_t b, int64_t first, int64_t last) {
                for (int64_t i = first; i < last; ++i) {
                  widen_row<T>(
                      rows.image(b) + residual.position(b, i) * rows.stride_n, residual.dim,
                      wide.data());
                  norm_row<T>(
                      wide.data(), norm, residual.dim,
                      out_rows + (b * residual.count + i) * residual.dim);
                }
              });
        });
  });
  return out.release();
}

void add_(Tensor x, const OptionalTensor& idx, const Tensor& update, const OptionalTensor& gamma) {
  constexpr const Op& op = op_named("add_");
  Residual residual(op, check(op, {&x, ptr_or_null(idx), &update, ptr_or_null(gamma)}), x, idx);
  with_update_types(residual, update, [&](auto tag, auto update_tag, const Tensor& updates) {
    add_rows<decltype(tag), decltype(update_tag)>(
        residual, updates, gamma, [](int64_t, int64_t, const auto*) {});
  });
}

Returned add_norm_(
    Tensor x, const OptionalTensor& idx, const Tensor& update, const OptionalTensor& gamma,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms) {
  constexpr const Op& op = op_named("add_norm_");
  const Dims dims = check(
      op,
      {&x, ptr_or_null(idx), &update, ptr_or_null(gamma), ptr_or_null(weight), ptr_or_null(bias)});
  Residual residual(op, dims, x, idx);
  Output out({residual.batch, residual.count, residual.dim}, x.scalar_type());
  with_update_types(residual, update, [&](auto tag, auto update_tag, const Tensor& updates) {
    using T = decltype(tag);
    Channels<acc_t<T>> scale(weight), shift(bias);
    const Norm<acc_t<T>> norm{scale.data(), shift.data(), eps, rms};
    T* out_rows = out.data<T>();
    const int64_t count = residual.count, dim = residual.dim;
    add_rows<T, decltype(update_tag)>(
        residual, updates, gamma, [&](int64_t b, int64_t i, const acc_t<T>* wide) {
          norm_row<T>(wide, norm, dim, out_rows + (b * count + i) * dim);
        });
  });
  return out.release();
}

// Sizes (B, N) that raise scores, and the cost scales (B, N) that scores are turned into; null if
// absent.
struct Weights {
  const float* sizes;
  double size_weight;
  float* cost_scale;
  double cost_weight;
};

// For the active tokens of image b: scores += size_weight * their standard deviation over the
// patches * log(size), and of patches the cost scale exp(cost_weight * (new score - mean) /
// standard deviation), 1 without a spread.
void weigh_scores(
    const Residual& residual, int64_t b, int64_t num_prefix, const Weights& weights,
    float* scores) {
  constexpr double kMostExponent = 60;  // so that scales are finite and positive
  const int64_t patches = std::max<int64_t>(residual.count - num_prefix, 1);
  double mean = 0, squares = 0;
  for (int64_t i = num_prefix; i < residual.count; ++i) mean += scores[i];
  mean /= patches;
  for (int64_t i = num_prefix; i < residual.count; ++i)
    squares += (scores[i] - mean) * (scores[i] - mean);
  const double deviation = std::sqrt(squares / patches), scale = weights.size_weight * deviation;
  if (weights.sizes != nullptr &&
      std::isfinite(scale)) {  // scores with NaN or infinity have no spread
    const float* sizes = weights.sizes + b * residual.n;
    for (int64_t i = 0; i < residual.count; ++i)
      scores[i] +=
          static_cast<float>(scale * std::log(static_cast<double>(sizes[residual.position(b, i)])));
  }
  if (weights.cost_scale == nullptr) return;
  float* cost_scale = weights.cost_scale + b * residual.n;
  const bool has_spread = std::isfinite(deviation) && deviation > 0;
  for (int64_t i = num_prefix; i < residual.count; ++i) {
    const double exponent = has_spread ? weights.cost_weight * (scores[i] - mean) / deviation : 0;
    cost_scale[residual.position(b, i)] =
        std::exp(static_cast<float>(std::clamp(exponent, -kMostExponent, kMostExponent)));
  }
}

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
  const int64_t n = dims['N'], count = dims['K'], dim = dims['D'];
  const Priority ranks(priority, n);
  const bool adjusts = sizes && size_weight != 0;
  const Tensor dense_sizes = adjusts ? torch::stable::contiguous(*sizes) : x;
  const Weights weights{
      adjusts ? data<float>(dense_sizes) : nullptr, size_weight,
      cost_scale ? mutable_data<float>(*cost_scale) : nullptr, cost_weight};
  const int64_t num_prune = count - num_keep;
  Output kept({residual.batch, num_keep}, ScalarType::Long),
      pruned({residual.batch, num_prune}, ScalarType::Long);
  int64_t *kept_pos = kept.data<int64_t>(), *pruned_pos = pruned.data<int64_t>();
  with_update_types(residual, update, [&](auto tag, auto update_tag, const Tensor& updates) {
    using T = decltype(tag);
    add_rows<T, decltype(update_tag)>(
        residual, updates, gamma, [](int64_t, int64_t, const auto*) {});
    Scratch<acc_t<T>> folded(dim);
    fold_query(query, folded.data());
    Scratch<float> values(residual.batch * count);
    const T* rows = data<T>(x);
    const acc_t<T>* direction = folded.data();
    float* scores = values.data();
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
    parallel_for(0, residual.batch, row_grain(16 * count), [&](int64_t begin, int64_t end) {
      Scratch<select_key_t<float>> keys(count);
      Scratch<int8_t> active_rank(priority ? count : 0);
      for (int64_t b = begin; b < end; ++b) {
        int64_t *keep = kept_pos + b * num_keep, *drop = pruned_pos + b * num_prune;
        if (weights.sizes != nullptr || weights.cost_scale != nullptr)
          weigh_scores(residual, b, num_prefix, weights, scores + b * count);
        const int8_t* rank = ranks.image(b);
        if (rank != nullptr) {
          for (int64_t i = 0; i < count; ++i) active_rank.data()[i] = rank[residual.position(b, i)];
          rank = active_rank.data();
        }
        select_image(
            scores + b * count, rank, count, num_keep, num_prefix, keys.data(), keep, drop);
        for (int64_t i = 0; i < num_keep; ++i) keep[i] = residual.position(b, keep[i]);
        for (int64_t i = 0; i < num_prune; ++i) drop[i] = residual.position(b, drop[i]);
      }
    });
  });
  return {kept.release(), pruned.release()};
}

// Rotates one head of one token: pairs (c, c + 1), or (c, c + width / 2) with half.
template <typename T, typename A>
CROPR_INLINE void rotate_head(T* x, const A* sin, const A* cos, int64_t width, bool half) {
  const int64_t step = half ? 1 : 2, distance = half ? width / 2 : 1;
  for (int64_t pair = 0; pair < width / 2; ++pair) {
    const int64_t low = pair * step, high = low + distance;
    const A a = static_cast<A>(load_one(x + low)), b = static_cast<A>(load_one(x + high));
    store_one(x + low, static_cast<acc_t<T>>(a * cos[low] - b * sin[low]));
    store_one(x + high, static_cast<acc_t<T>>(b * cos[high] + a * sin[high]));
  }
}

void rotate_(
    Tensor x, const Tensor& table, const OptionalTensor& idx, int64_t num_prefix, bool half) {
  constexpr const Op& op = op_named("rotate_");
  const Dims dims = check(op, {&x, &table, ptr_or_null(idx)}, {num_prefix});
  const int64_t batch = dims['B'], count = dims['K'], heads = dims['H'], width = dims['C'],
                patches = dims['P'];
  if (width % 2) fail("rotate_: x must have an even number of channels, got ", width);
  Tensor positions;
  const int64_t* idx_pos = nullptr;
  if (!idx) {
    if (patches < count - num_prefix)
      fail(
          "rotate_: table must have a row for each of the ", count - num_prefix, " patches, got ",
          patches);
  } else {
    positions = torch::stable::contiguous(*idx);
    idx_pos = data<int64_t>(positions);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = num_prefix; i < count; ++i) {
        const int64_t position = idx_pos[b * count + i];
        if (position < num_prefix || position >= num_prefix + patches)
          fail(
              "rotate_: idx must hold positions in [", num_prefix, ", ", num_prefix + patches,
              ") after the prefix, got ", position);
      }
  }
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    constexpr auto wide = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    const Tensor angles = torch::stable::contiguous(
        table.scalar_type() == wide ? table : torch::stable::to(table, wide));
    const A* rows = data<A>(angles);
    T* values = mutable_data<T>(x);
    const int64_t stride_b = x.stride(0), stride_n = x.stride(1), stride_h = x.stride(2),
                  num_patches = count - num_prefix;
    parallel_for(
        0, batch * num_patches, row_grain(2 * heads * width), [&](int64_t begin, int64_t end) {
          for_each_image_range(
              begin, end, num_patches, [&](int64_t b, int64_t first, int64_t last) {
                for (int64_t i = num_prefix + first; i < num_prefix + last; ++i) {
                  const A* sin =
                      rows + ((idx_pos ? idx_pos[b * count + i] : i) - num_prefix) * 2 * width;
                  for (int64_t h = 0; h < heads; ++h)
                    rotate_head<T, A>(
                        values + b * stride_b + i * stride_n + h * stride_h, sin, sin + width,
                        width, half);
                }
              });
        });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cropr, CPU, library) {
  library.impl("gather_norm", TORCH_BOX(&gather_norm));
  library.impl("add_", TORCH_BOX(&add_));
  library.impl("add_norm_", TORCH_BOX(&add_norm_));
  library.impl("add_select_", TORCH_BOX(&add_select_));
  library.impl("rotate_", TORCH_BOX(&rotate_));
}

}  // namespace cropr
