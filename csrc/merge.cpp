// CPU kernels of cropr::merge and merge_: each token that leaves goes into the kept token most similar to it.
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "rows.h"
#include "simd.h"
#include "tensor.h"

namespace cropr {
namespace {

using torch::stable::parallel_for;
using OptionalTensor = std::optional<Tensor>;

// Who stays and who leaves, as positions of x (B, N, D).
struct Sides {
  Tensor kept, pruned;  // contiguous
  const int64_t *kept_pos, *pruned_pos;
  int64_t batch, n, num_keep, num_prune, num_prefix;

  Sides(const char* op, const Tensor& x, const Tensor& kept_idx, const Tensor& pruned_idx, int64_t prefix) {
    check_dim(op, "x", x, 3, "(B, N, D)");
    check_float(op, "x", x);
    batch = x.size(0), n = x.size(1), num_prefix = prefix;
    num_keep = take(op, "kept_idx", "(B, K)", kept_idx), num_prune = take(op, "pruned_idx", "(B, R)", pruned_idx);
    if (num_prefix < 0 || num_prefix > num_keep)
      fail(op, ": num_prefix must be in [0, K] = [0, ", num_keep, "], got ", num_prefix);
    if (num_prune > 0 && num_keep == num_prefix)
      fail(op, ": kept_idx must hold a token behind the prefix to merge into, got K = num_prefix = ", num_prefix);
    kept = torch::stable::contiguous(kept_idx), pruned = torch::stable::contiguous(pruned_idx);
    kept_pos = data<int64_t>(kept), pruned_pos = data<int64_t>(pruned);
    check_positions_once(op, kept_pos, num_keep, pruned_pos, num_prune, batch, n);
  }

  int64_t take(const char* op, const char* name, const char* shape, const Tensor& idx) const {
    check_cpu(op, name, idx);
    check_dim(op, name, idx, 2, shape);
    check_index(op, name, idx);
    if (idx.size(0) != batch)
      fail(op, ": ", name, " must have the batch size of x, B = ", batch, ", got shape ", shape_of(idx));
    return idx.size(1);
  }
};

void check_features(const char* op, const Tensor& x, const OptionalTensor& features) {
  if (!features) return;
  check_cpu(op, "features", *features);
  check_dim(op, "features", *features, 3, "(B, N, C)");
  check_float(op, "features", *features);
  if (features->size(0) != x.size(0) || features->size(1) != x.size(1))
    fail(
        op, ": features must have the batch and tokens of x, (", x.size(0), ", ", x.size(1), "), got ",
        shape_of(*features));
}

// For each leaving token the slot in kept_idx, behind the prefix, of the highest cosine; the lowest slot of equals.
// A leaving token's own norm does not change its order of candidates, so only theirs divides.
template <typename T>
void find_slots(const Rows<T>& features, const Sides& sides, int64_t* slots) {
  using A = acc_t<T>;
  constexpr int64_t kTogether = 16;  // leaving tokens that share one pass over the kept ones
  const int64_t dim = features.dim, groups = (sides.num_prune + kTogether - 1) / kTogether;
  if (groups == 0) return;
  parallel_for(0, sides.batch * groups, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> leaving(kTogether * dim);
    Scratch<A> wide(dim);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / groups, first = task % groups * kTogether;
      const int64_t count = std::min(kTogether, sides.num_prune - first);
      const T* rows = features.image(b);
      const int64_t* from = sides.pruned_pos + b * sides.num_prune + first;
      for (int64_t r = 0; r < count; ++r)
        std::copy_n(rows + from[r] * features.stride_n, dim, leaving.data() + r * dim);
      A best[kTogether], products[kTogether], square;
      std::fill_n(best, kTogether, -std::numeric_limits<A>::infinity());
      int64_t* mine = slots + b * sides.num_prune + first;
      std::fill_n(mine, count, sides.num_prefix);
      for (int64_t slot = sides.num_prefix; slot < sides.num_keep; ++slot) {
        const T* row = rows + sides.kept_pos[b * sides.num_keep + slot] * features.stride_n;
        widen_row<T>(row, dim, wide.data());
        dot_rows<T>(row, dim, 1, dim, wide.data(), &square);
        dot_rows<T>(leaving.data(), dim, count, dim, wide.data(), products);
        const A norm = std::sqrt(square);
        for (int64_t r = 0; r < count; ++r) {
          const A similarity = products[r] / norm;
          if (similarity > best[r]) best[r] = similarity, mine[r] = slot;  // never for NaN
        }
      }
    }
  });
}

// kept[slot] = (size * x + sum of those that came) / (size + sum of their sizes), rounded once, for every slot that
// someone came to. `written(b, slot)` is where that row goes.
template <typename T, typename Written>
void combine(
    const Rows<T>& x, const Sides& sides, const float* sizes, const int64_t* slots, float* kept_sizes,
    const Written& written) {
  using A = acc_t<T>;
  parallel_for(0, sides.batch, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> sum(x.dim);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t *kept = sides.kept_pos + b * sides.num_keep, *leaving = sides.pruned_pos + b * sides.num_prune;
      const int64_t* mine = slots + b * sides.num_prune;
      const float* size = sizes + b * sides.n;
      float* total = kept_sizes + b * sides.num_keep;
      for (int64_t i = 0; i < sides.num_keep; ++i) total[i] = size[kept[i]];
      std::vector<bool> done(sides.num_keep, false);
      for (int64_t r = 0; r < sides.num_prune; ++r) {
        const int64_t slot = mine[r];
        if (done[slot]) continue;
        done[slot] = true;
        std::fill_n(sum.data(), x.dim, A(0));
        const auto add = [&](int64_t position) {
          const A weight = size[position];
          weighted_sum<T>(x.image(b) + position * x.stride_n, x.stride_n, 1, x.dim, &weight, sum.data());
        };
        add(kept[slot]);
        for (int64_t other = r; other < sides.num_prune; ++other) {
          if (mine[other] != slot) continue;
          add(leaving[other]);
          total[slot] += size[leaving[other]];
        }
        T* row = written(b, slot);
        const A whole = total[slot];
        for (int64_t d = 0; d < x.dim; ++d) store_one(row + d, sum.data()[d] / whole);
      }
    }
  });
}

void slots_by_features(const Tensor& x, const OptionalTensor& features, const Sides& sides, int64_t* slots) {
  const Tensor dense = with_dense_rows(features ? *features : x);
  with_float_type(dense.scalar_type(), [&](auto tag) { find_slots(Rows<decltype(tag)>(dense), sides, slots); });
}

std::tuple<Returned, Returned, Returned> merge(
    const Tensor& x, const Tensor& kept_idx, const Tensor& pruned_idx, const Tensor& sizes,
    const OptionalTensor& features, int64_t num_prefix) {
  const Sides sides("merge", x, kept_idx, pruned_idx, num_prefix);
  check_sizes("merge", x, sizes);
  check_features("merge", x, features);
  if (sides.num_keep + sides.num_prune != sides.n)
    fail(
        "merge: kept_idx and pruned_idx must together hold N = ", sides.n, " positions, got ", sides.num_keep, " + ",
        sides.num_prune);
  const int64_t dim = x.size(2), num_keep = sides.num_keep, num_prune = sides.num_prune;
  const Tensor dense = with_dense_rows(x), weights = torch::stable::contiguous(sizes);
  Output kept({sides.batch, num_keep, dim}, x.scalar_type());
  Output kept_sizes({sides.batch, num_keep}, ScalarType::Float);
  Output dest({sides.batch, sides.n}, ScalarType::Long);
  std::vector<int64_t> slots(sides.batch * num_prune);
  slots_by_features(x, features, sides, slots.data());
  int64_t* went = dest.data<int64_t>();
  for (int64_t b = 0; b < sides.batch; ++b) {
    for (int64_t i = 0; i < num_keep; ++i) went[b * sides.n + sides.kept_pos[b * num_keep + i]] = i;
    for (int64_t r = 0; r < num_prune; ++r)
      went[b * sides.n + sides.pruned_pos[b * num_prune + r]] = slots[b * num_prune + r];
  }
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> rows(dense);
    T* out = kept.data<T>();
    parallel_for(0, sides.batch * num_keep, row_grain(dim), [&](int64_t begin, int64_t end) {
      for_each_image_range(begin, end, num_keep, [&](int64_t b, int64_t first, int64_t last) {
        gather_rows(
            rows.image(b), rows.stride_n, dim, sides.kept_pos + b * num_keep, first, last, out + b * num_keep * dim);
      });
    });
    combine(rows, sides, data<float>(weights), slots.data(), kept_sizes.data<float>(), [&](int64_t b, int64_t slot) {
      return out + (b * num_keep + slot) * dim;
    });
  });
  return {kept.release(), kept_sizes.release(), dest.release()};
}

Returned merge_(
    Tensor x, const Tensor& kept_idx, const Tensor& pruned_idx, Tensor sizes, Tensor parent, const Tensor& tickets,
    const OptionalTensor& features, int64_t num_prefix) {
  const Sides sides("merge_", x, kept_idx, pruned_idx, num_prefix);
  if (!x.is_contiguous()) fail("merge_: x must be contiguous, as it changes in place");
  check_sizes("merge_", x, sizes);
  if (!sizes.is_contiguous()) fail("merge_: sizes must be contiguous, as it changes in place");
  check_features("merge_", x, features);
  check_cpu("merge_", "parent", parent);
  if (parent.scalar_type() != ScalarType::Long || parent.dim() != 2 || parent.size(0) != sides.batch ||
      parent.size(1) != sides.n || !parent.is_contiguous())
    fail(
        "merge_: parent must be contiguous int64 of shape (B, N) = (", sides.batch, ", ", sides.n, "), got ",
        dtype_of(parent), " ", shape_of(parent));
  check_tickets("merge_", tickets, sides.batch);
  Output kept_sizes({sides.batch, sides.num_keep}, ScalarType::Float);
  std::vector<int64_t> slots(sides.batch * sides.num_prune);
  slots_by_features(x, features, sides, slots.data());
  float *size = mutable_data<float>(sizes), *total = kept_sizes.data<float>();
  with_float_type(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* rows = mutable_data<T>(x);
    combine(Rows<T>(x), sides, size, slots.data(), total, [&](int64_t b, int64_t slot) {
      return rows + (b * sides.n + sides.kept_pos[b * sides.num_keep + slot]) * x.size(2);
    });
  });
  int64_t* into = mutable_data<int64_t>(parent);
  for (int64_t b = 0; b < sides.batch; ++b) {
    const int64_t* kept = sides.kept_pos + b * sides.num_keep;
    for (int64_t i = 0; i < sides.num_keep; ++i) size[b * sides.n + kept[i]] = total[b * sides.num_keep + i];
    for (int64_t r = 0; r < sides.num_prune; ++r)
      into[b * sides.n + sides.pruned_pos[b * sides.num_prune + r]] = kept[slots[b * sides.num_prune + r]];
  }
  return kept_sizes.release();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cropr, CPU, library) {
  library.impl("merge", TORCH_BOX(&merge));
  library.impl("merge_", TORCH_BOX(&merge_));
}

}  // namespace cropr
