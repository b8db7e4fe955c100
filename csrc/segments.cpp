// CPU kernel of cropr::attend_segments: PyTorch's attention, one image at a time.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>

#include "checks.h"
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

Tensor view(
    const Tensor& base, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& strides,
    int64_t offset) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(base.get(), 4, sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

// The tokens of an image in x (T, H, C), as (1, H, K, C).
Tensor heads_of(const Tensor& x, int64_t first, int64_t count) {
  const int64_t step = x.stride(0);
  return view(
      x, {1, x.size(1), count, x.size(2)}, {count * step, x.stride(1), step, x.stride(2)},
      first * step);
}

// The log sizes of an image in (T,), as a mask (1, 1, 1, K).
Tensor mask_of(const Tensor& log_sizes, int64_t first, int64_t count) {
  return view(log_sizes, {1, 1, 1, count}, {count, count, count, 1}, first);
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
  if (bias && q.scalar_type() == ScalarType::Double)
    bias = torch::stable::to(*bias, ScalarType::Double);
  if (bias) bias = torch::stable::contiguous(*bias);
  const Tensor out = empty({num_tokens, q.size(1), q.size(2)}, q.scalar_type());
  if (out.numel() == 0) return out;
  for (int64_t b = 0; b + 1 < num_starts; ++b) {
    const int64_t first = start[b], count = start[b + 1] - first;
    if (count == 0) continue;
    OptionalTensor mask;
    if (bias) mask = mask_of(*bias, first, count);
    AtenTensorHandle mask_handle = mask ? mask->get() : nullptr, attended, normalizers;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(
        heads_of(queries, first, count).get(), heads_of(keys, first, count).get(),
        heads_of(values, first, count).get(), 0.0, 0, mask ? &mask_handle : nullptr,
        scale ? &*scale : nullptr, &attended, &normalizers));
    const Tensor result(attended), unused(normalizers);
    Tensor target = heads_of(out, first, count);
    torch::stable::copy_(target, result);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cropr, CPU, library) {
  library.impl("attend_segments", TORCH_BOX(&attend_segments));
}

}  // namespace cropr
