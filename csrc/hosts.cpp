// CPU kernels of cropr::host_offsets, host_offsets_ and add_hosts: pruned tokens are restored with what changed since.
#include <vector>

#include "nearest.h"
#include "row_kernels.h"
#include "rows.h"
#include "tensor.h"

namespace cropr {
namespace {

using torch::stable::parallel_for;

// The host of each pruned token, as a position, and its row less that of the host: `written(b, r)` is where that goes.
template <typename T, typename Written>
void subtract_hosts(const Rows<T>& x, const Lists& lists, int64_t* host_idx, const Written& written) {
  const int64_t count = lists.num_candidates;
  std::vector<double> similarities(lists.batch * count);
  find_nearest(x, lists, host_idx, similarities.data());
  // Rows of hosts do not change, and each pruned one is read by itself alone: in place is safe.
  parallel_for(0, lists.batch * count, row_grain(x.dim), [&](int64_t begin, int64_t end) {
    Scratch<acc_t<T>> scratch(2 * x.dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / count;
      host_idx[i] = lists.safe_pos[b * lists.num_safe + host_idx[i]];
      const T* own = x.image(b) + lists.candidate_pos[i] * x.stride_n;
      T* out = written(b, i);
      if (out != own) std::copy_n(own, x.dim, out);
      subtract_row<T>(out, x.image(b) + host_idx[i] * x.stride_n, x.dim, scratch.data());
    }
  });
}

std::tuple<Returned, Returned> host_offsets(
    const Tensor& x, const Tensor& kept_idx, const Tensor& pruned_idx, int64_t num_prefix) {
  constexpr const Op& op = op_named("host_offsets");
  const Dims dims = check(op, {&x, &kept_idx, &pruned_idx}, {num_prefix});
  const Lists lists(op, dims, kept_idx, pruned_idx, num_prefix);
  if (lists.num_candidates > 0) lists.require_target(op);
  const Tensor dense = with_dense_rows(x);
  Output host_idx({lists.batch, lists.num_candidates}, ScalarType::Long);
  Output offset({lists.batch, lists.num_candidates, dims['D']}, x.scalar_type());
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* out = offset.data<T>();
    subtract_hosts(
        Rows<T>(dense), lists, host_idx.data<int64_t>(), [&](int64_t, int64_t i) { return out + i * dims['D']; });
  });
  return {offset.release(), host_idx.release()};
}

void host_offsets_(Tensor x, const Tensor& kept_idx, const Tensor& pruned_idx, Tensor parent, int64_t num_prefix) {
  constexpr const Op& op = op_named("host_offsets_");
  const Dims dims = check(op, {&x, &kept_idx, &pruned_idx, &parent}, {num_prefix});
  const Lists lists(op, dims, kept_idx, pruned_idx, num_prefix);
  if (lists.num_candidates > 0) lists.require_target(op);
  std::vector<int64_t> host_idx(lists.batch * lists.num_candidates);
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* rows = mutable_data<T>(x);
    subtract_hosts(Rows<T>(x), lists, host_idx.data(), [&](int64_t b, int64_t i) {
      return rows + (b * lists.n + lists.candidate_pos[i]) * dims['D'];
    });
  });
  int64_t* into = mutable_data<int64_t>(parent);
  for (size_t i = 0; i < host_idx.size(); ++i)
    into[i / lists.num_candidates * lists.n + lists.candidate_pos[i]] = host_idx[i];
}

// Following parents from any token must end at one that is its own parent.
void check_ends(const int64_t* parent, int64_t batch, int64_t n) {
  std::vector<int64_t> seen(n);  // from which token on the way came here first
  for (int64_t b = 0; b < batch; ++b, parent += n) {
    std::fill(seen.begin(), seen.end(), -1);
    for (int64_t first = 0; first < n; ++first)
      for (int64_t at = first; seen[at] < 0 || seen[at] == first; at = parent[at]) {
        if (parent[at] == at) break;
        if (seen[at] == first)
          fail("add_hosts: parent must lead to a token that is its own parent, got a cycle at ", at, " in image ", b);
        seen[at] = first;
      }
  }
}

Returned add_hosts(const Tensor& x, const Tensor& parent) {
  constexpr const Op& op = op_named("add_hosts");
  const Dims dims = check(op, {&x, &parent});
  const int64_t batch = dims['B'], n = dims['N'], dim = dims['D'];
  const Tensor dense = with_dense_rows(x), parents = torch::stable::contiguous(parent);
  const int64_t* up = data<int64_t>(parents);
  check_positions(op, "parent", up, batch * n, n);
  check_ends(up, batch, n);
  Output out({batch, n, dim}, x.scalar_type());
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Rows<T> rows(dense);
    T* written = out.data<T>();
    parallel_for(0, batch * n, row_grain(dim), [&](int64_t begin, int64_t end) {
      Scratch<A> sum(dim), wide(dim);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / n;
        const int64_t* parent_of = up + b * n;
        const auto row = [&](int64_t position) { return rows.image(b) + position * rows.stride_n; };
        std::copy_n(row(i % n), dim, written + i * dim);
        int64_t at = parent_of[i % n];
        if (at == i % n) continue;
        widen_row<T>(row(at), dim, sum.data());
        for (const A one = 1; parent_of[at] != at;) {
          at = parent_of[at];
          weighted_sum<T>(row(at), rows.stride_n, 1, dim, &one, sum.data());
        }
        add_row<T>(written + i * dim, sum.data(), nullptr, dim, wide.data());
      }
    });
  });
  return out.release();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cropr, CPU, library) {
  library.impl("host_offsets", TORCH_BOX(&host_offsets));
  library.impl("host_offsets_", TORCH_BOX(&host_offsets_));
  library.impl("add_hosts", TORCH_BOX(&add_hosts));
}

}  // namespace cropr
