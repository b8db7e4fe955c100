// CPU kernels of cropr::scores, select, prune, gather and restore.
#include <algorithm>
#include <optional>
#include <vector>

#include "rows.h"
#include "select.h"
#include "simd.h"
#include "tensor.h"

namespace cropr {
namespace {

using torch::stable::parallel_for;
using OptionalTensor = std::optional<Tensor>;

// out[idx[i]] = x[i] for i in [first, last)
template <typename T>
void scatter_rows(
    const T* x, int64_t stride_n, int64_t dim, const int64_t* idx, int64_t first, int64_t last, T* out,
    const RowCopy& copy) {
  for (int64_t i = first; i < last;) {
    const int64_t rows = stride_n == dim ? run_length(idx, i, last) : 1;
    copy(x + i * stride_n, rows * dim, out + idx[i] * dim);
    i += rows;
  }
  copy.finish();
}

// Rows [first, last) of the N that the two index lists hold together: kept first, then pruned.
template <typename Body>
void split_range(int64_t first, int64_t last, int64_t num_keep, const Body& body) {
  if (first < num_keep) body(true, first, std::min(last, num_keep));
  if (last > num_keep) body(false, std::max<int64_t>(first - num_keep, 0), last - num_keep);
}

Returned scores(const Tensor& x, const Tensor& query) {
  check_tokens_and_query("scores", x, query);
  const Tensor dense = with_dense_rows(x);
  Output out({x.size(0), x.size(1)}, ScalarType::Float);
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    Scratch<acc_t<T>> folded(x.size(2));
    fold_query(query, folded.data());
    score_batch(Rows<T>(dense), folded.data(), out.data<float>());
  });
  return out.release();
}

std::tuple<Returned, Returned> select(
    const Tensor& scores, int64_t num_keep, int64_t num_prefix, const OptionalTensor& priority) {
  check_dim("select", "scores", scores, 2, "(B, N)");
  check_float("select", "scores", scores);
  const int64_t batch = scores.size(0), n = scores.size(1);
  check_counts("select", n, num_keep, num_prefix);
  const Priority ranks("select", priority, batch, n);
  const Tensor dense = with_dense_rows(scores);
  Output kept_idx({batch, num_keep}, ScalarType::Long);
  Output pruned_idx({batch, n - num_keep}, ScalarType::Long);
  with_float_type(scores.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* values = data<T>(dense);
    const int64_t stride = dense.stride(0);
    int64_t* kept = kept_idx.data<int64_t>();
    int64_t* pruned = pruned_idx.data<int64_t>();
    parallel_for(0, batch, row_grain(16 * n), [&](int64_t begin, int64_t end) {
      Scratch<select_key_t<T>> keys(n);
      for (int64_t b = begin; b < end; ++b)
        select_image(
            values + b * stride, ranks.image(b), n, num_keep, num_prefix, keys.data(), kept + b * num_keep,
            pruned + b * (n - num_keep));
    });
  });
  return {kept_idx.release(), pruned_idx.release()};
}

using SplitOutputs = std::tuple<Returned, Returned, Returned, Returned>;

// Kept and pruned rows with their positions, by the scores of the query or, if that is null, by given ones (B, N).
SplitOutputs split_rows(
    const Tensor& x, const Tensor* query, const float* given, int64_t num_keep, int64_t num_prefix,
    const Priority& priority) {
  const int64_t batch = x.size(0), n = x.size(1), dim = x.size(2), num_prune = n - num_keep;
  const Tensor dense = with_dense_rows(x);
  Output kept({batch, num_keep, dim}, x.scalar_type());
  Output kept_idx({batch, num_keep}, ScalarType::Long);
  Output pruned({batch, num_prune, dim}, x.scalar_type());
  Output pruned_idx({batch, num_prune}, ScalarType::Long);
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> rows(dense);
    Scratch<acc_t<T>> folded(dim);
    if (query != nullptr) fold_query(*query, folded.data());
    T* kept_out = kept.data<T>();
    T* pruned_out = pruned.data<T>();
    int64_t* kept_pos = kept_idx.data<int64_t>();
    int64_t* pruned_pos = pruned_idx.data<int64_t>();

    const RowCopy how(batch * n * dim * sizeof(T));
    const auto copy = [&](int64_t b, int64_t first, int64_t last) {
      split_range(first, last, num_keep, [&](bool stays, int64_t from, int64_t to) {
        const int64_t count = stays ? num_keep : num_prune;
        gather_rows(
            rows.image(b), rows.stride_n, dim, (stays ? kept_pos : pruned_pos) + b * count, from, to,
            (stays ? kept_out : pruned_out) + b * count * dim, how);
      });
    };
    const auto select_from = [&](int64_t b, const float* values, select_key_t<float>* keys) {
      select_image(
          values, priority.image(b), n, num_keep, num_prefix, keys, kept_pos + b * num_keep,
          pruned_pos + b * num_prune);
    };

    if (batch >= static_cast<int64_t>(torch::stable::get_num_threads())) {
      // An image at a time: its rows are still in the cache when they are copied.
      parallel_for(0, batch, row_grain(n * dim), [&](int64_t begin, int64_t end) {
        Scratch<float> values(n);
        Scratch<select_key_t<float>> keys(n);
        for (int64_t b = begin; b < end; ++b) {
          if (query != nullptr) score_rows<T>(rows.image(b), rows.stride_n, n, dim, folded.data(), values.data());
          select_from(b, query != nullptr ? values.data() : given + b * n, keys.data());
          copy(b, 0, n);
        }
      });
    } else {
      Scratch<float> values(query != nullptr ? batch * n : 0);
      Scratch<select_key_t<float>> keys(n);
      if (query != nullptr) score_batch(rows, folded.data(), values.data());
      const float* scores = query != nullptr ? values.data() : given;
      for (int64_t b = 0; b < batch; ++b) select_from(b, scores + b * n, keys.data());
      parallel_for(
          0, batch * n, row_grain(dim), [&](int64_t begin, int64_t end) { for_each_image_range(begin, end, n, copy); });
    }
  });
  return {kept.release(), kept_idx.release(), pruned.release(), pruned_idx.release()};
}

SplitOutputs prune(
    const Tensor& x, const Tensor& query, int64_t num_keep, int64_t num_prefix, const OptionalTensor& priority) {
  check_tokens_and_query("prune", x, query);
  check_counts("prune", x.size(1), num_keep, num_prefix);
  const Priority ranks("prune", priority, x.size(0), x.size(1));
  return split_rows(x, &query, nullptr, num_keep, num_prefix, ranks);
}

SplitOutputs split(
    const Tensor& x, const Tensor& scores, int64_t num_keep, int64_t num_prefix, const OptionalTensor& priority) {
  check_cpu("split", "scores", scores);
  check_dim("split", "x", x, 3, "(B, N, D)");
  check_float("split", "x", x);
  if (scores.scalar_type() != ScalarType::Float) fail("split: scores must be float32, got ", dtype_of(scores));
  if (scores.dim() != 2 || scores.size(0) != x.size(0) || scores.size(1) != x.size(1))
    fail("split: scores must have shape (B, N) = (", x.size(0), ", ", x.size(1), "), got ", shape_of(scores));
  check_counts("split", x.size(1), num_keep, num_prefix);
  const Tensor dense = torch::stable::contiguous(scores);
  const Priority ranks("split", priority, x.size(0), x.size(1));
  return split_rows(x, nullptr, data<float>(dense), num_keep, num_prefix, ranks);
}

Returned gather(const Tensor& x, const Tensor& idx) {
  check_cpu("gather", "idx", idx);
  check_dim("gather", "x", x, 3, "(B, N, D)");
  check_float("gather", "x", x);
  check_dim("gather", "idx", idx, 2, "(B, K)");
  check_index("gather", "idx", idx);
  if (idx.size(0) != x.size(0))
    fail("gather: idx must have the batch size of x, B = ", x.size(0), ", got shape ", shape_of(idx));
  const Tensor dense = with_dense_rows(x), positions = torch::stable::contiguous(idx);
  const int64_t batch = x.size(0), count = idx.size(1), dim = x.size(2);
  check_positions("gather", "idx", data<int64_t>(positions), batch * count, x.size(1));
  Output out({batch, count, dim}, x.scalar_type());
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> rows(dense);
    T* written = out.data<T>();
    const RowCopy how(batch * count * dim * sizeof(T));
    parallel_for(0, batch * count, row_grain(dim), [&](int64_t begin, int64_t end) {
      for_each_image_range(begin, end, count, [&](int64_t b, int64_t first, int64_t last) {
        gather_rows(
            rows.image(b), rows.stride_n, dim, data<int64_t>(positions) + b * count, first, last,
            written + b * count * dim, how);
      });
    });
  });
  return out.release();
}

void check_restore_part(
    const char* name, const char* idx_name, const Tensor& part, const Tensor& idx, const Tensor& kept) {
  check_cpu("restore", name, part);
  check_cpu("restore", idx_name, idx);
  check_dim("restore", name, part, 3, "(B, tokens, D)");
  check_float("restore", name, part);
  check_dim("restore", idx_name, idx, 2, "(B, tokens)");
  check_index("restore", idx_name, idx);
  if (idx.size(0) != part.size(0) || idx.size(1) != part.size(1))
    fail(
        "restore: ", idx_name, " must have the first two sizes of ", name, ", ", shape_of(part), ", got ",
        shape_of(idx));
  if (part.size(0) != kept.size(0) || part.size(2) != kept.size(2))
    fail("restore: ", name, " must have the batch and width of kept, ", shape_of(kept), ", got ", shape_of(part));
  if (part.scalar_type() != kept.scalar_type())
    fail("restore: ", name, " must have the dtype of kept, ", dtype_of(kept), ", got ", dtype_of(part));
}

Returned restore(const Tensor& kept, const Tensor& kept_idx, const Tensor& pruned, const Tensor& pruned_idx) {
  check_restore_part("kept", "kept_idx", kept, kept_idx, kept);
  check_restore_part("pruned", "pruned_idx", pruned, pruned_idx, kept);
  const int64_t batch = kept.size(0), num_keep = kept.size(1), num_prune = pruned.size(1), dim = kept.size(2);
  const int64_t n = num_keep + num_prune;
  const Tensor kept_rows = with_dense_rows(kept), pruned_rows = with_dense_rows(pruned);
  const Tensor kept_pos = torch::stable::contiguous(kept_idx), pruned_pos = torch::stable::contiguous(pruned_idx);
  check_positions_once(
      "restore", "kept_idx and pruned_idx", data<int64_t>(kept_pos), num_keep, data<int64_t>(pruned_pos), num_prune,
      batch, n);
  Output out({batch, n, dim}, kept.scalar_type());
  with_float_type(kept.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> kept_in(kept_rows), pruned_in(pruned_rows);
    T* written = out.data<T>();
    const RowCopy how(batch * n * dim * sizeof(T));
    parallel_for(0, batch * n, row_grain(dim), [&](int64_t begin, int64_t end) {
      for_each_image_range(begin, end, n, [&](int64_t b, int64_t first, int64_t last) {
        split_range(first, last, num_keep, [&](bool stays, int64_t from, int64_t to) {
          const Rows<T>& rows = stays ? kept_in : pruned_in;
          const int64_t* idx = data<int64_t>(stays ? kept_pos : pruned_pos) + b * rows.count;
          scatter_rows(rows.image(b), rows.stride_n, dim, idx, from, to, written + b * n * dim, how);
        });
      });
    });
  });
  return out.release();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cropr, CPU, library) {
  library.impl("scores", TORCH_BOX(&scores));
  library.impl("select", TORCH_BOX(&select));
  library.impl("prune", TORCH_BOX(&prune));
  library.impl("split", TORCH_BOX(&split));
  library.impl("gather", TORCH_BOX(&gather));
  library.impl("restore", TORCH_BOX(&restore));
}

}  // namespace cropr
