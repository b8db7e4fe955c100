// CPU kernels of cropr::attend and its gradient for the queries.
//
// One query reads the tokens once. Many queries are matrix products by aten::mm, one image at a
// time, so that nothing larger than (M, N) is allocated.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "checks.h"
#include "row_kernels.h"
#include "rows.h"
#include "tensor.h"

namespace cropr {
namespace {

using torch::stable::parallel_for;

void check_attend(const Op& op, const Tensor& x, std::initializer_list<const Tensor*> tensors) {
  if (check(op, tensors)['N'] == 0)
    fail(name_of(op), ": x must have at least one token, got shape ", shape_of(x));
}

template <typename A>
constexpr ScalarType acc_dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// Converts to a contiguous tensor of the accumulation type, without a copy if it already is one.
template <typename A>
Tensor as_acc(const Tensor& t) {
  const Tensor cast = t.scalar_type() == acc_dtype<A> ? t : torch::stable::to(t, acc_dtype<A>);
  return torch::stable::contiguous(cast);
}

Tensor as_dtype(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// In-place softmax over rows of (rows, n).
template <typename A>
void softmax_rows(A* logits, int64_t rows, int64_t n) {
  parallel_for(0, rows, std::max<int64_t>(1, 4096 / n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* row = logits + i * n;
      const A highest = *std::max_element(row, row + n);
      A sum = 0;
      for (int64_t j = 0; j < n; ++j) sum += row[j] = std::exp(row[j] - highest);
      for (int64_t j = 0; j < n; ++j) row[j] /= sum;
    }
  });
}

template <typename A>
void scale_by(const A* values, A factor, int64_t count, A* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = values[i] * factor;
}

// weight (N,) = softmax(scale * query . x), for one image and one query; raw, if not null, receives
// the products.
template <typename T>
void attention_row(
    const T* x, int64_t stride, int64_t n, int64_t dim, const acc_t<T>* query, acc_t<T> scale,
    acc_t<T>* weight, float* raw) {
  dot_rows<T>(x, stride, n, dim, query, weight);
  if (raw != nullptr) std::copy_n(weight, n, raw);
  const auto [low, high] = std::minmax_element(weight, weight + n);
  const acc_t<T> highest = scale * (scale < 0 ? *low : *high);
  acc_t<T> sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += weight[i] = std::exp(scale * weight[i] - highest);
  for (int64_t i = 0; i < n; ++i) weight[i] /= sum;
}

template <typename T>
void attend_one(
    const Tensor& x, const acc_t<T>* query, acc_t<T> scale, const Tensor& out, float* raw) {
  using A = acc_t<T>;
  const int64_t batch = x.size(0), n = x.size(1), dim = x.size(2), stride = x.stride(1);
  parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> weight(n), sum(dim);
    for (int64_t b = begin; b < end; ++b) {
      const T* image = data<T>(x) + b * x.stride(0);
      attention_row<T>(
          image, stride, n, dim, query, scale, weight.data(), raw ? raw + b * n : nullptr);
      std::fill(sum.begin(), sum.end(), A(0));
      weighted_sum<T>(image, stride, n, dim, weight.data(), sum.data());
      T* row = mutable_data<T>(out) + b * dim;
      for (int64_t d = 0; d < dim; ++d) store_one(row + d, sum[d]);
    }
  });
}

Tensor transposed(const Tensor& t) {
  return torch::stable::transpose(t, 0, 1);
}

// a b, in the dtype of both. Written to an allocated tensor, as autocast would change the dtype of
// aten::mm.
template <typename A>
Tensor product(const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  const Tensor out = empty({a.size(0), b.size(1)}, acc_dtype<A>);
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The softmax (M, N) of one image, from scaled queries (M, D) and tokens (N, D).
template <typename A>
Tensor attention(const Tensor& queries, const Tensor& tokens) {
  const Tensor logits = product<A>(queries, transposed(tokens));
  softmax_rows(mutable_data<A>(logits), logits.size(0), logits.size(1));
  return logits;
}

template <typename A>
Tensor scaled_queries(const Tensor& queries, double scale) {
  const Tensor wide = as_acc<A>(queries);
  Tensor out = empty({queries.size(0), queries.size(1)}, acc_dtype<A>);
  scale_by<A>(data<A>(wide), static_cast<A>(scale), queries.numel(), mutable_data<A>(out));
  return out;
}

// Also writes the scores (B, N) of cropr::scores unless null: with one query they are the logits.
Tensor attend_all(const Tensor& x, const Tensor& queries, double scale, float* scores) {
  const int64_t batch = x.size(0), count = queries.size(0), dim = x.size(2);
  const Tensor dense = with_dense_rows(x);
  Tensor out = empty({batch, count, dim}, x.scalar_type());
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    if (count == 1) {
      attend_one<T>(dense, data<A>(as_acc<A>(queries)), static_cast<A>(scale), out, scores);
      return;
    }
    if (scores != nullptr) {
      Scratch<A> folded(dim);
      fold_query(queries, folded.data());
      score_batch(Rows<T>(dense), folded.data(), scores);
    }
    if (out.numel() == 0) return;
    const Tensor query = scaled_queries<A>(queries, scale);
    for (int64_t b = 0; b < batch; ++b) {
      const Tensor tokens = as_acc<A>(torch::stable::select(dense, 0, b));
      Tensor target = torch::stable::select(out, 0, b);
      torch::stable::copy_(target, product<A>(attention<A>(query, tokens), tokens));
    }
  });
  return out;
}

Tensor attend(const Tensor& x, const Tensor& queries, double scale) {
  check_attend(op_named("attend"), x, {&x, &queries});
  return attend_all(x, queries, scale, nullptr);
}

std::tuple<Tensor, Tensor> attend_scores(const Tensor& x, const Tensor& queries, double scale) {
  check_attend(op_named("attend_scores"), x, {&x, &queries});
  Tensor scores = empty({x.size(0), x.size(1)}, ScalarType::Float);
  Tensor out = attend_all(x, queries, scale, mutable_data<float>(scores));
  return {out, scores};
}

// With p = softmax(scale q.x): dq = scale * sum_n p_n (g.x_n - g.out) x_n, and out = sum_n p_n x_n.
template <typename T>
void attend_one_backward(
    const Tensor& x, const acc_t<T>* query, const acc_t<T>* grad, double scale,
    acc_t<T>* grad_query) {
  using A = acc_t<T>;
  const int64_t batch = x.size(0), n = x.size(1), dim = x.size(2), stride = x.stride(1);
  std::vector<A> per_image(
      batch * dim, A(0));  // summed in order afterwards: the same bits on any thread count
  parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> weight(n), slope(n);
    for (int64_t b = begin; b < end; ++b) {
      const T* image = data<T>(x) + b * x.stride(0);
      attention_row<T>(image, stride, n, dim, query, static_cast<A>(scale), weight.data(), nullptr);
      dot_rows<T>(image, stride, n, dim, grad + b * dim, slope.data());
      A mean = 0;
      for (int64_t i = 0; i < n; ++i) mean += weight[i] * slope[i];
      for (int64_t i = 0; i < n; ++i) weight[i] *= slope[i] - mean;
      weighted_sum<T>(image, stride, n, dim, weight.data(), per_image.data() + b * dim);
    }
  });
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t d = 0; d < dim; ++d) grad_query[d] += per_image[b * dim + d];
  scale_by<A>(grad_query, static_cast<A>(scale), dim, grad_query);
}

Tensor attend_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& queries, double scale) {
  check_attend(op_named("attend_backward"), x, {&x, &queries, &grad_out});
  const int64_t batch = x.size(0), n = x.size(1), count = queries.size(0), dim = x.size(2);
  const Tensor dense = with_dense_rows(x);
  return with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Tensor grad = as_acc<A>(grad_out);
    Tensor sum = empty({count, dim}, acc_dtype<A>);
    A* total = mutable_data<A>(sum);
    std::fill_n(total, count * dim, A(0));
    if (count == 1) {
      attend_one_backward<T>(dense, data<A>(as_acc<A>(queries)), data<A>(grad), scale, total);
      return as_dtype(sum, queries.scalar_type());
    }
    const Tensor query = scaled_queries<A>(queries, scale);
    for (int64_t b = 0; b < batch; ++b) {
      const Tensor tokens = as_acc<A>(torch::stable::select(dense, 0, b));
      const Tensor weight = attention<A>(query, tokens);
      const Tensor slope = product<A>(torch::stable::select(grad, 0, b), transposed(tokens));
      A* p = mutable_data<A>(weight);
      const A* s = data<A>(slope);
      parallel_for(0, count, std::max<int64_t>(1, 4096 / n), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
          A mean = 0;
          for (int64_t i = 0; i < n; ++i) mean += p[m * n + i] * s[m * n + i];
          for (int64_t i = 0; i < n; ++i)
            p[m * n + i] *= static_cast<A>(scale) * (s[m * n + i] - mean);
        }
      });
      const Tensor part = product<A>(weight, tokens);
      const A* values = data<A>(part);
      for (int64_t i = 0; i < count * dim; ++i) total[i] += values[i];
    }
    return as_dtype(sum, queries.scalar_type());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cropr, CPU, library) {
  library.impl("attend", TORCH_BOX(&attend));
  library.impl("attend_scores", TORCH_BOX(&attend_scores));
  library.impl("attend_backward", TORCH_BOX(&attend_backward));
}

}  // namespace cropr
