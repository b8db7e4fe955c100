// CPU kernel of cropr::attend_segments.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "checks.h"
#include "head_attention.h"
#include "rows.h"
#include "tensor.h"

namespace cropr {
namespace {

void check_starts(
    const Op& op, const int64_t* starts, int64_t count, int64_t num_tokens, int64_t longest) {
  if (count == 0) fail(name_of(op), ": starts must hold at least 0, got shape (0,)");
  for (int64_t i = 0; i < count; ++i)
    if (starts[i] < (i ? starts[i - 1] : 0) || starts[i] > num_tokens || (i == 0 && starts[i] > 0))
      fail(
          name_of(op), ": starts must ascend from 0 to T = ", num_tokens, ", got ", starts[i],
          " at ", i);
  if (starts[count - 1] != num_tokens)
    fail(name_of(op), ": starts must end with T = ", num_tokens, ", got ", starts[count - 1]);
  for (int64_t b = 0; b + 1 < count; ++b)
    if (starts[b + 1] - starts[b] > longest)
      fail(
          name_of(op), ": longest must be at least ", starts[b + 1] - starts[b],
          ", the tokens of image ", b, ", got ", longest);
}

// Queries of a task: a head is packed again where a thread begins within it.
constexpr int64_t kTaskQueries = 8 * kQueryBlock;

template <typename T>
HeadRows<const T> rows_of(const Tensor& x, int64_t token, int64_t head) {
  return {data<T>(x) + token * x.stride(0) + head * x.stride(1), x.stride(0)};
}

// Tasks are blocks of queries, of one head after the other, image after image.
template <typename T>
void attend_images(
    const Tensor& q, const Tensor& k, const Tensor& v, const int64_t* starts, int64_t batch,
    const float* log_sizes, acc_t<T> scale, T* out) {
  using A = acc_t<T>;
  const int64_t heads = q.size(1), width = q.size(2);
  std::vector<int64_t> first_task(batch + 1, 0);
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t count = starts[b + 1] - starts[b];
    longest = std::max(longest, count);
    first_task[b + 1] = first_task[b] + (count + kTaskQueries - 1) / kTaskQueries * heads;
  }
  torch::stable::parallel_for(0, first_task[batch], 1, [&](int64_t begin, int64_t end) {
    Scratch<A> memory(PackedHead<A>::elements(longest, width));
    int64_t b =
        std::upper_bound(first_task.begin(), first_task.end(), begin) - first_task.begin() - 1;
    int64_t packed = -1;  // the head that is packed, of the image
    for (int64_t task = begin; task < end; ++task) {
      for (; task >= first_task[b + 1]; ++b) packed = -1;
      const int64_t first = starts[b], count = starts[b + 1] - first;
      const int64_t blocks = (first_task[b + 1] - first_task[b]) / heads;
      const int64_t head = (task - first_task[b]) / blocks;
      const int64_t query = (task - first_task[b]) % blocks * kTaskQueries;
      const PackedHead<A> keys_and_values(count, width, memory.data());
      if (std::exchange(packed, head) != head)
        pack_head<T>(
            rows_of<T>(k, first, head), rows_of<T>(v, first, head),
            log_sizes ? log_sizes + first : nullptr, keys_and_values);
      attend_head<T>(
          rows_of<T>(q, first + query, head), std::min(kTaskQueries, count - query), scale,
          keys_and_values, {out + ((first + query) * heads + head) * width, heads * width});
    }
  });
}

Tensor attend_segments(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts, int64_t longest,
    const OptionalTensor& log_sizes, std::optional<double> scale) {
  constexpr const Op& op = op_named("attend_segments");
  check(op, {&q, &k, &v, &starts, ptr_or_null(log_sizes)}, {longest});
  const int64_t num_tokens = q.size(0), num_starts = starts.size(0);
  const Tensor bounds = torch::stable::contiguous(starts);
  const int64_t* start = data<int64_t>(bounds);
  check_starts(op, start, num_starts, num_tokens, longest);

  const Tensor queries = with_dense_rows(q), keys = with_dense_rows(k), values = with_dense_rows(v);
  OptionalTensor bias = log_sizes;
  if (bias) bias = torch::stable::contiguous(*bias);
  const Tensor out = empty({num_tokens, q.size(1), q.size(2)}, q.scalar_type());
  if (out.numel() == 0) return out;
  with_float_type(q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    attend_images<T>(
        queries, keys, values, start, num_starts - 1, bias ? data<float>(*bias) : nullptr,
        static_cast<acc_t<T>>(scale.value_or(1 / std::sqrt(q.size(2)))), mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cropr, CPU, library) {
  library.impl("attend_segments", TORCH_BOX(&attend_segments));
}

}  // namespace cropr
