// The residual buffer of the engine, and what is added to its active rows.
#pragma once

#include "checks.h"
#include "ragged.h"
#include "row_kernels.h"
#include "rows.h"
#include "tensor.h"

namespace cropr {

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

  // Ragged images: x.view(1, B * N, D) and its active rows.
  Residual(const Op& op, const Tensor& tensor, const RaggedRows& active)
      : x(tensor),
        idx(active.rows),
        positions(active.row_data),
        batch(1),
        n(active.batch * active.n),
        count(active.num_rows),
        dim(tensor.size(2)) {
    active.check_ascending(op, "rows");
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
  torch::stable::parallel_for(
      0, residual.batch * count, row_grain(2 * dim), [&](int64_t begin, int64_t end) {
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
            add_row<T>(
                x + (b * n + residual.position(b, i)) * dim, values, factors, dim, wide.data());
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

}  // namespace cropr
