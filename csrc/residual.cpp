// CPU kernels of the residual buffer: cropr::gather_norm, add_, add_norm_ and rotate_.
#include "residual.h"

#include "row_kernels.h"
#include "rows.h"
#include "tensor.h"

namespace cropr {
namespace {

using torch::stable::parallel_for;

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
  library.impl("rotate_", TORCH_BOX(&rotate_));
}

}  // namespace cropr
