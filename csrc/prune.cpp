// CPU kernels of cropr::scores, select, prune, gather and restore.
#include <algorithm>
#include <vector>

#include "row_kernels.h"
#include "rows.h"
#include "select.h"
#include "tensor.h"

namespace cropr {
namespace {

using torch::stable::parallel_for;

// out[idx[i]] = x[i] for i in [first, last)
template <typename T>
void scatter_rows(
    const T* x, int64_t stride_n, int64_t dim, const int64_t* idx, int64_t first, int64_t last,
    T* out, const RowCopy& copy) {
  for (int64_t i = first; i < last;) {
    const int64_t rows = stride_n == dim ? run_length(idx, i, last) : 1;
    copy(x + i * stride_n, rows * dim, out + idx[i] * dim);
    i += rows;
  }
  copy.finish();
}

// Splits rows [first, last) of the concatenated lists, kept then pruned, into a range of each.
template <typename Body>
void split_range(int64_t first, int64_t last, int64_t num_keep, const Body& body) {
  if (first < num_keep) body(true, first, std::min(last, num_keep));
  if (last > num_keep) body(false, std::max<int64_t>(first - num_keep, 0), last - num_keep);
}

Returned scores(const Tensor& x, const Tensor& query) {
  const Dims dims = check(op_named("scores"), {&x, &query});
  const Tensor dense = with_dense_rows(x);
  Output out({dims['B'], dims['N']}, ScalarType::Float);
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    Scratch<acc_t<T>> folded(dims['D']);
    fold_query(query, folded.data());
    score_batch(Rows<T>(dense), folded.data(), out.data<float>());
  });
  return out.release();
}

std::tuple<Returned, Returned> select(
    const Tensor& scores, int64_t num_keep, int64_t num_prefix, const OptionalTensor& priority) {
  const Dims dims =
      check(op_named("select"), {&scores, ptr_or_null(priority)}, {num_prefix, num_keep});
  const int64_t batch = dims['B'], n = dims['N'];
  const Priority ranks(priority, n);
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
            values + b * stride, ranks.image(b), n, num_keep, num_prefix, keys.data(),
            kept + b * num_keep, pruned + b * (n - num_keep));
    });
  });
  return {kept_idx.release(), pruned_idx.release()};
}

using SplitOutputs = std::tuple<Returned, Returned, Returned, Returned>;

// Kept and pruned rows with their positions, by the scores of the query or, if it is null, by known
// scores (B, N).
SplitOutputs split_rows(
    const Dims& dims, const Tensor& x, const Tensor* query, const float* known_scores,
    int64_t num_keep, int64_t num_prefix, const OptionalTensor& priorities) {
  const int64_t batch = dims['B'], n = dims['N'], dim = dims['D'], num_prune = n - num_keep;
  const Priority priority(priorities, n);
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

    const RowCopy copy_row(batch * n * dim * sizeof(T));
    const auto copy = [&](int64_t b, int64_t first, int64_t last) {
      split_range(first, last, num_keep, [&](bool kept_side, int64_t begin, int64_t end) {
        const int64_t count = kept_side ? num_keep : num_prune;
        gather_rows(
            rows.image(b), rows.stride_n, dim, (kept_side ? kept_pos : pruned_pos) + b * count,
            begin, end, (kept_side ? kept_out : pruned_out) + b * count * dim, copy_row);
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
          if (query != nullptr)
            score_rows<T>(rows.image(b), rows.stride_n, n, dim, folded.data(), values.data());
          select_from(b, query != nullptr ? values.data() : known_scores + b * n, keys.data());
          copy(b, 0, n);
        }
      });
    } else {
      Scratch<float> values(query != nullptr ? batch * n : 0);
      Scratch<select_key_t<float>> keys(n);
      if (query != nullptr) score_batch(rows, folded.data(), values.data());
      const float* scores = query != nullptr ? values.data() : known_scores;
      for (int64_t b = 0; b < batch; ++b) select_from(b, scores + b * n, keys.data());
      parallel_for(0, batch * n, row_grain(dim), [&](int64_t begin, int64_t end) {
        for_each_image_range(begin, end, n, copy);
      });
    }
  });
  return {kept.release(), kept_idx.release(), pruned.release(), pruned_idx.release()};
}

SplitOutputs prune(
    const Tensor& x, const Tensor& query, int64_t num_keep, int64_t num_prefix,
    const OptionalTensor& priority) {
  const Dims dims =
      check(op_named("prune"), {&x, &query, ptr_or_null(priority)}, {num_prefix, num_keep});
  return split_rows(dims, x, &query, nullptr, num_keep, num_prefix, priority);
}

SplitOutputs split(
    const Tensor& x, const Tensor& scores, int64_t num_keep, int64_t num_prefix,
    const OptionalTensor& priority) {
  const Dims dims =
      check(op_named("split"), {&x, &scores, ptr_or_null(priority)}, {num_prefix, num_keep});
  const Tensor dense = torch::stable::contiguous(scores);
  return split_rows(dims, x, nullptr, data<float>(dense), num_keep, num_prefix, priority);
}

Returned gather(const Tensor& x, const Tensor& idx) {
  constexpr const Op& op = op_named("gather");
  const Dims dims = check(op, {&x, &idx});
  const Tensor dense = with_dense_rows(x), positions = torch::stable::contiguous(idx);
  const int64_t batch = dims['B'], count = dims['K'], dim = dims['D'];
  check_positions(op, "idx", data<int64_t>(positions), batch * count, dims['N']);
  Output out({batch, count, dim}, x.scalar_type());
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> rows(dense);
    T* out_rows = out.data<T>();
    const RowCopy copy_row(batch * count * dim * sizeof(T));
    parallel_for(0, batch * count, row_grain(dim), [&](int64_t begin, int64_t end) {
      for_each_image_range(begin, end, count, [&](int64_t b, int64_t first, int64_t last) {
        gather_rows(
            rows.image(b), rows.stride_n, dim, data<int64_t>(positions) + b * count, first, last,
            out_rows + b * count * dim, copy_row);
      });
    });
  });
  return out.release();
}

Returned restore(
    const Tensor& kept, const Tensor& kept_idx, const Tensor& pruned, const Tensor& pruned_idx) {
  constexpr const Op& op = op_named("restore");
  const Dims dims = check(op, {&kept, &kept_idx, &pruned, &pruned_idx});
  const int64_t batch = dims['B'], num_keep = dims['K'], num_prune = dims['R'], dim = dims['D'];
  const int64_t n = num_keep + num_prune;
  const Tensor kept_rows = with_dense_rows(kept), pruned_rows = with_dense_rows(pruned);
  const Tensor kept_pos = torch::stable::contiguous(kept_idx),
               pruned_pos = torch::stable::contiguous(pruned_idx);
  check_positions_once(
      op, "kept_idx and pruned_idx", data<int64_t>(kept_pos), num_keep, data<int64_t>(pruned_pos),
      num_prune, batch, n);
  Output out({batch, n, dim}, kept.scalar_type());
  with_float_type(kept.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> kept_in(kept_rows), pruned_in(pruned_rows);
    T* out_rows = out.data<T>();
    const RowCopy copy_row(batch * n * dim * sizeof(T));
    parallel_for(0, batch * n, row_grain(dim), [&](int64_t begin, int64_t end) {
      for_each_image_range(begin, end, n, [&](int64_t b, int64_t first, int64_t last) {
        split_range(first, last, num_keep, [&](bool kept_side, int64_t begin, int64_t end) {
          const Rows<T>& rows = kept_side ? kept_in : pruned_in;
          const int64_t* idx = data<int64_t>(kept_side ? kept_pos : pruned_pos) + b * rows.count;
          scatter_rows(
              rows.image(b), rows.stride_n, dim, idx, begin, end, out_rows + b * n * dim, copy_row);
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
