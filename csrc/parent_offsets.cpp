// CPU kernels of cropr::parent_offsets, parent_offsets_ and add_parents: restoring pruned tokens
// with the change of their parents.
#include <vector>

#include "nearest.h"
#include "row_kernels.h"
#include "rows.h"
#include "tensor.h"

namespace cropr {
namespace {

using torch::stable::parallel_for;

// Finds the parent of each pruned token, as a position, and writes its row less the parent's to
// output_row(b, i).
template <typename T, typename OutputRow>
void subtract_parents(
    const Rows<T>& x, const MatchedLists& lists, int64_t* parent_idx, const OutputRow& output_row) {
  const int64_t count = lists.num_candidates;
  std::vector<double> similarities(lists.batch * count);
  find_nearest(x, lists, parent_idx, similarities.data());
  // In place no thread reads a row that another writes: parents are kept, and kept rows do not
  // change.
  parallel_for(0, lists.batch * count, row_grain(x.dim), [&](int64_t begin, int64_t end) {
    Scratch<acc_t<T>> scratch(2 * x.dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / count;
      parent_idx[i] = lists.target_pos[b * lists.num_targets + parent_idx[i]];
      const T* pruned_row = x.image(b) + lists.candidate_pos[i] * x.stride_n;
      T* out = output_row(b, i);
      if (out != pruned_row) std::copy_n(pruned_row, x.dim, out);
      subtract_row<T>(out, x.image(b) + parent_idx[i] * x.stride_n, x.dim, scratch.data());
    }
  });
}

std::tuple<Returned, Returned> parent_offsets(
    const Tensor& x, const Tensor& kept_idx, const Tensor& pruned_idx, int64_t num_prefix) {
  constexpr const Op& op = op_named("parent_offsets");
  const Dims dims = check(op, {&x, &kept_idx, &pruned_idx}, {num_prefix});
  const MatchedLists lists(op, dims, kept_idx, pruned_idx, num_prefix);
  if (lists.num_candidates > 0) lists.require_target(op);
  const Tensor dense = with_dense_rows(x);
  Output parent_idx({lists.batch, lists.num_candidates}, ScalarType::Long);
  Output offset({lists.batch, lists.num_candidates, dims['D']}, x.scalar_type());
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* out = offset.data<T>();
    subtract_parents(Rows<T>(dense), lists, parent_idx.data<int64_t>(), [&](int64_t, int64_t i) {
      return out + i * dims['D'];
    });
  });
  return {offset.release(), parent_idx.release()};
}

void parent_offsets_(
    Tensor x, const Tensor& kept_idx, const Tensor& pruned_idx, Tensor parent, int64_t num_prefix) {
  constexpr const Op& op = op_named("parent_offsets_");
  const Dims dims = check(op, {&x, &kept_idx, &pruned_idx, &parent}, {num_prefix});
  const MatchedLists lists(op, dims, kept_idx, pruned_idx, num_prefix);
  if (lists.num_candidates > 0) lists.require_target(op);
  std::vector<int64_t> parent_idx(lists.batch * lists.num_candidates);
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* rows = mutable_data<T>(x);
    subtract_parents(Rows<T>(x), lists, parent_idx.data(), [&](int64_t b, int64_t i) {
      return rows + (b * lists.n + lists.candidate_pos[i]) * dims['D'];
    });
  });
  int64_t* parents = mutable_data<int64_t>(parent);
  for (size_t i = 0; i < parent_idx.size(); ++i)
    parents[i / lists.num_candidates * lists.n + lists.candidate_pos[i]] = parent_idx[i];
}

// Raises an error unless the parents of every token lead to one that is its own parent.
void check_no_cycles(const int64_t* parent, int64_t batch, int64_t n) {
  std::vector<int64_t> reached_from(n);  // by token: the start of the walk that first reached it
  for (int64_t b = 0; b < batch; ++b, parent += n) {
    std::fill(reached_from.begin(), reached_from.end(), -1);
    for (int64_t first = 0; first < n; ++first)
      for (int64_t position = first; reached_from[position] < 0 || reached_from[position] == first;
           position = parent[position]) {
        if (parent[position] == position) break;
        if (reached_from[position] == first)
          fail(
              "add_parents: parent must lead to a token that is its own parent, got a cycle at ",
              position, " in image ", b);
        reached_from[position] = first;
      }
  }
}

Returned add_parents(const Tensor& x, const Tensor& parent) {
  constexpr const Op& op = op_named("add_parents");
  const Dims dims = check(op, {&x, &parent});
  const int64_t batch = dims['B'], n = dims['N'], dim = dims['D'];
  const Tensor dense = with_dense_rows(x), parents = torch::stable::contiguous(parent);
  const int64_t* parent_pos = data<int64_t>(parents);
  check_positions(op, "parent", parent_pos, batch * n, n);
  check_no_cycles(parent_pos, batch, n);
  Output out({batch, n, dim}, x.scalar_type());
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Rows<T> rows(dense);
    T* out_rows = out.data<T>();
    parallel_for(0, batch * n, row_grain(dim), [&](int64_t begin, int64_t end) {
      Scratch<A> sum(dim), wide(dim);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / n;
        const int64_t* parent_of = parent_pos + b * n;
        const auto row = [&](int64_t position) { return rows.image(b) + position * rows.stride_n; };
        std::copy_n(row(i % n), dim, out_rows + i * dim);
        int64_t ancestor = parent_of[i % n];
        if (ancestor == i % n) continue;
        widen_row<T>(row(ancestor), dim, sum.data());
        for (const A weight = 1; parent_of[ancestor] != ancestor;) {
          ancestor = parent_of[ancestor];
          weighted_sum<T>(row(ancestor), rows.stride_n, 1, dim, &weight, sum.data());
        }
        add_row<T>(out_rows + i * dim, sum.data(), nullptr, dim, wide.data());
      }
    });
  });
  return out.release();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cropr, CPU, library) {
  library.impl("parent_offsets", TORCH_BOX(&parent_offsets));
  library.impl("parent_offsets_", TORCH_BOX(&parent_offsets_));
  library.impl("add_parents", TORCH_BOX(&add_parents));
}

}  // namespace cropr
