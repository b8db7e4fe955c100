// CPU kernels of the engine's residual stream: cropr::gather_norm, add_, add_norm_, add_select_ and rotate_.
#include <algorithm>
#include <cmath>
#include <optional>

#include "rows.h"
#include "select.h"
#include "simd.h"
#include "tensor.h"

namespace cropr {
namespace {

using torch::stable::parallel_for;
using OptionalTensor = std::optional<Tensor>;

// The stream x (B, N, D) and the K tokens alive in each image: positions idx (B, K), or all N without idx.
struct Stream {
  Tensor x;
  OptionalTensor idx;                  // contiguous
  const int64_t* positions = nullptr;  // of idx: asking a tensor for it is a call into libtorch
  int64_t batch, n, count, dim;

  Stream(const char* op, const Tensor& stream, const OptionalTensor& alive, bool in_place) : x(stream) {
    check_dim(op, "x", x, 3, "(B, N, D)");
    check_float(op, "x", x);
    if (in_place && !x.is_contiguous()) fail(op, ": x must be contiguous, as it changes in place");
    batch = x.size(0), n = x.size(1), dim = x.size(2), count = n;
    if (!alive) return;
    check_cpu(op, "idx", *alive);
    check_dim(op, "idx", *alive, 2, "(B, K)");
    check_index(op, "idx", *alive);
    if (alive->size(0) != batch)
      fail(op, ": idx must have the batch size of x, B = ", batch, ", got shape ", shape_of(*alive));
    idx = torch::stable::contiguous(*alive);
    count = idx->size(1);
    positions = data<int64_t>(*idx);
    check_positions(op, "idx", positions, batch * count, n);
  }

  // Position in x of the i-th token of image b.
  int64_t position(int64_t b, int64_t i) const {
    return positions ? positions[b * count + i] : i;
  }
};

// An optional vector over the channels, in the accumulation type; null where there is none.
template <typename A>
class Channels {
 public:
  explicit Channels(const OptionalTensor& vector) : values_(vector ? vector->size(0) : 0), given_(vector.has_value()) {
    if (given_) fold_query(*vector, values_.data());
  }
  const A* data() {
    return given_ ? values_.data() : nullptr;
  }

 private:
  Scratch<A> values_;
  bool given_;
};

void check_channels(const char* op, const char* name, const Tensor& x, const OptionalTensor& vector) {
  if (!vector) return;
  check_cpu(op, name, *vector);
  check_float(op, name, *vector);
  const int64_t dim = x.size(x.dim() - 1);
  if (vector->dim() != 1 || vector->size(0) != dim)
    fail(op, ": ", name, " must have shape (D,) = (", dim, ",), got ", shape_of(*vector));
}

void check_update(const char* op, const Stream& stream, const Tensor& update, const OptionalTensor& gamma) {
  check_cpu(op, "update", update);
  check_float(op, "update", update);
  if (update.dim() != 3 || update.size(0) != stream.batch || update.size(1) != stream.count ||
      update.size(2) != stream.dim)
    fail(
        op, ": update must have shape (B, K, D) = (", stream.batch, ", ", stream.count, ", ", stream.dim, "), got ",
        shape_of(update));
  check_channels(op, "gamma", stream.x, gamma);
}

// Adds every update to its row of the stream and calls after(b, i, wide) with what the row now holds. T is the type of
// x, U that of the updates.
template <typename T, typename U, typename After>
void add_rows(Stream& stream, const Tensor& update, const OptionalTensor& gamma, const After& after) {
  using A = acc_t<T>;
  Channels<A> scale(gamma);
  T* x = mutable_data<T>(stream.x);
  const U* updates = data<U>(update);
  const int64_t n = stream.n, count = stream.count, dim = stream.dim;
  const A* factors = scale.data();
  parallel_for(0, stream.batch * count, row_grain(2 * dim), [&](int64_t begin, int64_t end) {
    Scratch<A> wide(dim), step(dim);
    for_each_image_range(begin, end, count, [&](int64_t b, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const U* from = updates + (b * count + i) * dim;
        const A* values;
        if constexpr (std::is_same_v<U, A>) {
          values = from;
        } else {
          widen_row<U>(from, dim, step.data());
          values = step.data();
        }
        add_row<T>(x + (b * n + stream.position(b, i)) * dim, values, factors, dim, wide.data());
        after(b, i, wide.data());
      }
    });
  });
}

// Calls body(T{}, U{}, update) with the types of the stream and of the updates: those of another width than x are
// brought to the accumulation type first.
template <typename Body>
void with_update_types(const Stream& stream, const Tensor& update, const Body& body) {
  with_float_type(stream.x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Tensor dense = torch::stable::contiguous(update);
    if (update.scalar_type() == stream.x.scalar_type()) {
      body(tag, tag, dense);
    } else {
      constexpr auto wide = std::is_same_v<acc_t<T>, double> ? ScalarType::Double : ScalarType::Float;
      body(tag, acc_t<T>{}, dense.scalar_type() == wide ? dense : torch::stable::to(dense, wide));
    }
  });
}

Returned gather_norm(
    const Tensor& x, const OptionalTensor& idx, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  Stream stream("gather_norm", x, idx, false);
  check_channels("gather_norm", "weight", x, weight);
  check_channels("gather_norm", "bias", x, bias);
  const Tensor dense = with_dense_rows(x);
  Output out({stream.batch, stream.count, stream.dim}, x.scalar_type());
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> rows(dense);
    Channels<acc_t<T>> scale(weight), shift(bias);
    const auto *scales = scale.data(), *shifts = shift.data();
    T* written = out.data<T>();
    parallel_for(0, stream.batch * stream.count, row_grain(2 * stream.dim), [&](int64_t begin, int64_t end) {
      Scratch<acc_t<T>> wide(stream.dim);
      for_each_image_range(begin, end, stream.count, [&](int64_t b, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          widen_row<T>(rows.image(b) + stream.position(b, i) * rows.stride_n, stream.dim, wide.data());
          norm_row<T>(wide.data(), scales, shifts, eps, stream.dim, written + (b * stream.count + i) * stream.dim);
        }
      });
    });
  });
  return out.release();
}

void add_(Tensor x, const OptionalTensor& idx, const Tensor& update, const OptionalTensor& gamma) {
  Stream stream("add_", x, idx, true);
  check_update("add_", stream, update, gamma);
  with_update_types(stream, update, [&](auto tag, auto update_tag, const Tensor& updates) {
    add_rows<decltype(tag), decltype(update_tag)>(stream, updates, gamma, [](int64_t, int64_t, const auto*) {});
  });
}

Returned add_norm_(
    Tensor x, const OptionalTensor& idx, const Tensor& update, const OptionalTensor& gamma,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  Stream stream("add_norm_", x, idx, true);
  check_update("add_norm_", stream, update, gamma);
  check_channels("add_norm_", "weight", x, weight);
  check_channels("add_norm_", "bias", x, bias);
  Output out({stream.batch, stream.count, stream.dim}, x.scalar_type());
  with_update_types(stream, update, [&](auto tag, auto update_tag, const Tensor& updates) {
    using T = decltype(tag);
    Channels<acc_t<T>> scale(weight), shift(bias);
    const auto *scales = scale.data(), *shifts = shift.data();
    T* written = out.data<T>();
    const int64_t count = stream.count, dim = stream.dim;
    add_rows<T, decltype(update_tag)>(stream, updates, gamma, [&](int64_t b, int64_t i, const acc_t<T>* wide) {
      norm_row<T>(wide, scales, shifts, eps, dim, written + (b * count + i) * dim);
    });
  });
  return out.release();
}

// scores += size_weight * their standard deviation over the patches * log(size), for the tokens alive in image b.
void weigh_scores(
    const Stream& stream, int64_t b, int64_t num_prefix, double size_weight, const float* sizes, float* scores) {
  const int64_t patches = std::max<int64_t>(stream.count - num_prefix, 1);
  double mean = 0, squares = 0;
  for (int64_t i = num_prefix; i < stream.count; ++i) mean += scores[i];
  mean /= patches;
  for (int64_t i = num_prefix; i < stream.count; ++i) squares += (scores[i] - mean) * (scores[i] - mean);
  const double scale = size_weight * std::sqrt(squares / patches);
  if (!std::isfinite(scale)) return;  // scores with NaN or infinity have no spread
  for (int64_t i = 0; i < stream.count; ++i)
    scores[i] += static_cast<float>(scale * std::log(static_cast<double>(sizes[stream.position(b, i)])));
}

std::tuple<Returned, Returned> add_select_(
    Tensor x, const OptionalTensor& idx, const Tensor& update, const OptionalTensor& gamma, const Tensor& query,
    int64_t num_keep, int64_t num_prefix, const OptionalTensor& sizes, double size_weight,
    const OptionalTensor& priority) {
  Stream stream("add_select_", x, idx, true);
  check_update("add_select_", stream, update, gamma);
  check_tokens_and_query("add_select_", x, query);
  const int64_t n = stream.n, count = stream.count, dim = stream.dim;
  check_counts("add_select_", count, num_keep, num_prefix);
  if (sizes) check_sizes("add_select_", x, *sizes);
  const Priority ranks("add_select_", priority, stream.batch, n);
  const bool weighs = sizes && size_weight != 0;
  const Tensor weights = weighs ? torch::stable::contiguous(*sizes) : x;
  const float* size = weighs ? data<float>(weights) : nullptr;
  const int64_t num_prune = count - num_keep;
  Output kept({stream.batch, num_keep}, ScalarType::Long), pruned({stream.batch, num_prune}, ScalarType::Long);
  int64_t *kept_pos = kept.data<int64_t>(), *pruned_pos = pruned.data<int64_t>();
  with_update_types(stream, update, [&](auto tag, auto update_tag, const Tensor& updates) {
    using T = decltype(tag);
    add_rows<T, decltype(update_tag)>(stream, updates, gamma, [](int64_t, int64_t, const auto*) {});
    Scratch<acc_t<T>> folded(dim);
    fold_query(query, folded.data());
    Scratch<float> values(stream.batch * count);
    const T* rows = data<T>(x);
    const acc_t<T>* direction = folded.data();
    float* scores = values.data();
    parallel_for(0, stream.batch * count, row_grain(dim), [&](int64_t begin, int64_t end) {
      for_each_image_range(begin, end, count, [&](int64_t b, int64_t first, int64_t last) {
        for (int64_t i = first; i < last;) {
          const int64_t run = stream.positions ? run_length(stream.positions + b * count, i, last) : last - first;
          score_rows<T>(rows + (b * n + stream.position(b, i)) * dim, dim, run, dim, direction, scores + b * count + i);
          i += run;
        }
      });
    });
    parallel_for(0, stream.batch, row_grain(16 * count), [&](int64_t begin, int64_t end) {
      Scratch<select_key_t<float>> keys(count);
      Scratch<int8_t> own(priority ? count : 0);
      for (int64_t b = begin; b < end; ++b) {
        int64_t *stay = kept_pos + b * num_keep, *leave = pruned_pos + b * num_prune;
        if (size != nullptr) weigh_scores(stream, b, num_prefix, size_weight, size + b * n, scores + b * count);
        const int8_t* rank = ranks.image(b);
        if (rank != nullptr) {
          for (int64_t i = 0; i < count; ++i) own.data()[i] = rank[stream.position(b, i)];
          rank = own.data();
        }
        select_image(scores + b * count, rank, count, num_keep, num_prefix, keys.data(), stay, leave);
        for (int64_t i = 0; i < num_keep; ++i) stay[i] = stream.position(b, stay[i]);
        for (int64_t i = 0; i < num_prune; ++i) leave[i] = stream.position(b, leave[i]);
      }
    });
  });
  return {kept.release(), pruned.release()};
}

// One head of one token: pairs (c, c + 1), or (c, c + width / 2) with half.
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

void rotate_(Tensor x, const Tensor& table, const OptionalTensor& idx, int64_t num_prefix, bool half) {
  check_dim("rotate_", "x", x, 4, "(B, K, H, C)");
  check_float("rotate_", "x", x);
  const int64_t batch = x.size(0), count = x.size(1), heads = x.size(2), width = x.size(3);
  if (width % 2) fail("rotate_: x must have an even number of channels, got ", width);
  if (x.stride(3) != 1 && width > 1)
    fail("rotate_: x must have a stride of 1 in the last dimension, as it changes in place");
  check_cpu("rotate_", "table", table);
  check_float("rotate_", "table", table);
  if (table.dim() != 2 || table.size(1) != 2 * width)
    fail("rotate_: table must have shape (patches, 2 C) = (patches, ", 2 * width, "), got ", shape_of(table));
  if (num_prefix < 0 || num_prefix > count)
    fail("rotate_: num_prefix must be in [0, K] = [0, ", count, "], got ", num_prefix);
  const int64_t patches = table.size(0);
  Tensor positions;
  const int64_t* at = nullptr;
  if (!idx) {
    if (patches < count - num_prefix)
      fail("rotate_: table must have a row for each of the ", count - num_prefix, " patches, got ", patches);
  } else {
    check_cpu("rotate_", "idx", *idx);
    check_index("rotate_", "idx", *idx);
    if (idx->dim() != 2 || idx->size(0) != batch || idx->size(1) != count)
      fail("rotate_: idx must have shape (B, K) = (", batch, ", ", count, "), got ", shape_of(*idx));
    positions = torch::stable::contiguous(*idx);
    at = data<int64_t>(positions);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = num_prefix; i < count; ++i) {
        const int64_t position = at[b * count + i];
        if (position < num_prefix || position >= num_prefix + patches)
          fail(
              "rotate_: idx must hold positions in [", num_prefix, ", ", num_prefix + patches,
              ") behind the prefix, got ", position);
      }
  }
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    constexpr auto wide = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    const Tensor angles =
        torch::stable::contiguous(table.scalar_type() == wide ? table : torch::stable::to(table, wide));
    const A* rows = data<A>(angles);
    T* values = mutable_data<T>(x);
    const int64_t stride_b = x.stride(0), stride_n = x.stride(1), stride_h = x.stride(2), turning = count - num_prefix;
    parallel_for(0, batch * turning, row_grain(2 * heads * width), [&](int64_t begin, int64_t end) {
      for_each_image_range(begin, end, turning, [&](int64_t b, int64_t first, int64_t last) {
        for (int64_t i = num_prefix + first; i < num_prefix + last; ++i) {
          const A* sin = rows + ((at ? at[b * count + i] : i) - num_prefix) * 2 * width;
          for (int64_t h = 0; h < heads; ++h)
            rotate_head<T, A>(values + b * stride_b + i * stride_n + h * stride_h, sin, sin + width, width, half);
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
