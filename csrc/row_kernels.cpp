#include "row_kernels.h"

#include <cmath>
#include <vector>

namespace cropr {
namespace {

// Reorders a row as load_group does: for 16-bit types the even elements of each full group come
// before the odd ones.
template <typename T>
CROPR_INLINE void pack_row(const acc_t<T>* row, int64_t dim, acc_t<T>* packed) {
  constexpr int group = kGroup<T>, half = group / 2;
  int64_t d = 0;
  for (; d + group <= dim; d += group) {
    for (int i = 0; i < half; ++i) packed[d + i] = row[d + 2 * i];
    for (int i = 0; i < half; ++i) packed[d + half + i] = row[d + 2 * i + 1];
  }
  for (; d < dim; ++d) packed[d] = row[d];
}

// Adds the inverse of pack_row to `row`.
template <typename T>
CROPR_INLINE void add_unpacked(const acc_t<T>* packed, int64_t dim, acc_t<T>* row) {
  constexpr int group = kGroup<T>, half = group / 2;
  int64_t d = 0;
  if constexpr (kInterleaved<T>) {
    for (; d + group <= dim; d += group)
      for (int i = 0; i < group; ++i) row[d + i] += packed[d + (i % 2) * half + i / 2];
  }
  for (; d < dim; ++d) row[d] += packed[d];
}

// Sum over lanes as a tree of shuffles: a chain of scalar additions would cost more than a short
// row's products.
template <typename A, typename V>
CROPR_INLINE A horizontal_sum(V v) {
  if constexpr (kLanes<A> == 8) {
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  } else if constexpr (kLanes<A> == 4) {
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2);
  } else {
    v += __builtin_shufflevector(v, v, 1, 0);
  }
  return v[0];
}

// One row at a time: memory then sees one forward stream, which the hardware prefetcher follows
// across rows.
template <typename T>
CROPR_INLINE acc_t<T> dot_row(const T* x, int64_t dim, const acc_t<T>* query) {
  using A = acc_t<T>;
  using V = typename Pack<A>::type;
  constexpr int lanes = kLanes<A>;
  V sums[4] = {};
  int64_t d = 0;
  for (; d + 2 * kGroup<T> <= dim; d += 2 * kGroup<T>) {
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      V first, second;
      load_group(x + d + u * kGroup<T>, first, second);
      sums[2 * u] += first * load_pack(query + d + 2 * u * lanes);
      sums[2 * u + 1] += second * load_pack(query + d + (2 * u + 1) * lanes);
    }
  }
  if (d + kGroup<T> <= dim) {
    V first, second;
    load_group(x + d, first, second);
    sums[0] += first * load_pack(query + d);
    sums[1] += second * load_pack(query + d + lanes);
    d += kGroup<T>;
  }
  A sum = horizontal_sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; d < dim; ++d) sum += load_one(x + d) * query[d];
  return sum;
}

// For 16-bit types, which are bound by arithmetic: `rows` neighboring rows share each load of the
// query. The hardware prefetcher loses track of so many streams, so each step prefetches its share
// of the next block, in memory order. The order of a row's sum does not depend on `rows`.
template <typename T, int rows>
CROPR_INLINE void dot_block(
    const T* x, int64_t stride, int64_t dim, const acc_t<T>* query, acc_t<T>* out) {
  using A = acc_t<T>;
  using V = typename Pack<A>::type;
  constexpr int lanes = kLanes<A>;
  constexpr int64_t step_bytes = kGroup<T> * sizeof(T);
  const char* next_block = reinterpret_cast<const char*>(x + rows * stride);
  V first[rows] = {}, second[rows] = {};
  int64_t d = 0;
  for (; d + kGroup<T> <= dim; d += kGroup<T>) {
    const V query_first = load_pack(query + d), query_second = load_pack(query + d + lanes);
    for (int64_t line = 0; line < rows * step_bytes; line += 64)
      __builtin_prefetch(next_block + line);
    next_block += rows * step_bytes;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      V x_first, x_second;
      load_group(x + r * stride + d, x_first, x_second);
      first[r] += x_first * query_first;
      second[r] += x_second * query_second;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    A sum = horizontal_sum<A>(first[r] + second[r]);
    for (int64_t tail = d; tail < dim; ++tail) sum += load_one(x + r * stride + tail) * query[tail];
    out[r] = sum;
  }
}

template <typename T>
CROPR_INLINE void dot_rows_body(
    const T* x, int64_t stride, int64_t rows, int64_t dim, const acc_t<T>* query, acc_t<T>* out) {
  int64_t i = 0;
  if constexpr (kInterleaved<T>) {
    Scratch<acc_t<T>> packed(dim);
    pack_row<T>(query, dim, packed.data());
    for (; i + 4 <= rows; i += 4)
      dot_block<T, 4>(x + i * stride, stride, dim, packed.data(), out + i);
    for (; i < rows; ++i) dot_block<T, 1>(x + i * stride, stride, dim, packed.data(), out + i);
  } else {
    for (; i < rows; ++i) out[i] = dot_row(x + i * stride, dim, query);
  }
}

// Columns in strips that stay in registers while the rows stream past.
template <typename T>
CROPR_INLINE void weighted_sum_body(
    const T* x, int64_t stride, int64_t rows, int64_t dim, const acc_t<T>* weight, acc_t<T>* out) {
  using A = acc_t<T>;
  using V = typename Pack<A>::type;
  constexpr int lanes = kLanes<A>;
  constexpr int groups = 2;
  std::vector<A> packed(dim, A(0));
  int64_t d = 0;
  for (; d + kGroup<T> <= dim;) {
    const int strip = d + groups * kGroup<T> <= dim ? groups : 1;
    V sums[2 * groups];
    for (int u = 0; u < 2 * strip; ++u) sums[u] = load_pack(packed.data() + d + u * lanes);
    for (int64_t i = 0; i < rows; ++i) {
      V first, second;
      load_group(x + i * stride + d, first, second);
      sums[0] += weight[i] * first;
      sums[1] += weight[i] * second;
      if (strip == groups) {
        load_group(x + i * stride + d + kGroup<T>, first, second);
        sums[2] += weight[i] * first;
        sums[3] += weight[i] * second;
      }
    }
    for (int u = 0; u < 2 * strip; ++u)
      std::memcpy(packed.data() + d + u * lanes, &sums[u], sizeof(V));
    d += strip * kGroup<T>;
  }
  for (; d < dim; ++d)
    for (int64_t i = 0; i < rows; ++i) packed[d] += weight[i] * load_one(x + i * stride + d);
  add_unpacked<T>(packed.data(), dim, out);
}

template <typename T>
CROPR_INLINE void widen_body(const T* row, int64_t dim, acc_t<T>* wide) {
  for (int64_t d = 0; d < dim; ++d) wide[d] = load_one(row + d);
}

template <typename T>
CROPR_INLINE void add_body(
    T* x, const acc_t<T>* update, const acc_t<T>* gamma, int64_t dim, acc_t<T>* wide) {
  if (gamma == nullptr) {
    for (int64_t d = 0; d < dim; ++d) wide[d] = load_one(x + d) + update[d];
  } else {
    for (int64_t d = 0; d < dim; ++d) wide[d] = load_one(x + d) + gamma[d] * update[d];
  }
  for (int64_t d = 0; d < dim; ++d) store_one(x + d, wide[d]);
  if constexpr (kInterleaved<T>) widen_body(x, dim, wide);
}

// Sum of f(row[d]) in vectors: the compiler may not reorder a scalar chain.
template <typename A, typename F>
CROPR_INLINE A sum_of(const A* row, int64_t dim, const F& f) {
  using V = typename Pack<A>::type;
  constexpr int lanes = kLanes<A>;
  V sums[2] = {};
  int64_t d = 0;
  for (; d + 2 * lanes <= dim; d += 2 * lanes) {
    sums[0] += f(load_pack(row + d));
    sums[1] += f(load_pack(row + d + lanes));
  }
  A sum = horizontal_sum<A>(sums[0] + sums[1]);
  for (; d < dim; ++d) sum += f(row[d]);
  return sum;
}

template <typename T>
CROPR_INLINE void norm_body(const acc_t<T>* row, const Norm<acc_t<T>>& norm, int64_t dim, T* out) {
  using A = acc_t<T>;
  const A *weight = norm.weight, *bias = norm.bias;
  const A mean = norm.rms ? A(0) : sum_of(row, dim, [](auto v) { return v; }) / static_cast<A>(dim);
  const A variance =
      sum_of(row, dim, [mean](auto v) { return (v - mean) * (v - mean); }) / static_cast<A>(dim);
  const A scale = A(1) / std::sqrt(variance + static_cast<A>(norm.eps));
  if (weight != nullptr && bias != nullptr) {
    for (int64_t d = 0; d < dim; ++d)
      store_one(out + d, (row[d] - mean) * scale * weight[d] + bias[d]);
  } else {
    for (int64_t d = 0; d < dim; ++d)
      store_one(
          out + d, (row[d] - mean) * scale * (weight ? weight[d] : A(1)) + (bias ? bias[d] : A(0)));
  }
}

}  // namespace

// target_clones cannot be put on a template, so each type gets a plain function around the inlined
// body.
#define CROPR_ROW_KERNELS(T, suffix)                                                       \
  CROPR_CLONES void dot_rows_##suffix(                                                     \
      const T* x, int64_t stride, int64_t rows, int64_t dim, const acc_t<T>* query,        \
      acc_t<T>* out) {                                                                     \
    dot_rows_body<T>(x, stride, rows, dim, query, out);                                    \
  }                                                                                        \
  CROPR_CLONES void weighted_sum_##suffix(                                                 \
      const T* x, int64_t stride, int64_t rows, int64_t dim, const acc_t<T>* weight,       \
      acc_t<T>* out) {                                                                     \
    weighted_sum_body<T>(x, stride, rows, dim, weight, out);                               \
  }                                                                                        \
  template <>                                                                              \
  void dot_rows<T>(                                                                        \
      const T* x, int64_t stride, int64_t rows, int64_t dim, const acc_t<T>* query,        \
      acc_t<T>* out) {                                                                     \
    dot_rows_##suffix(x, stride, rows, dim, query, out);                                   \
  }                                                                                        \
  template <>                                                                              \
  void weighted_sum<T>(                                                                    \
      const T* x, int64_t stride, int64_t rows, int64_t dim, const acc_t<T>* weight,       \
      acc_t<T>* out) {                                                                     \
    weighted_sum_##suffix(x, stride, rows, dim, weight, out);                              \
  }                                                                                        \
  CROPR_CLONES void add_row_##suffix(                                                      \
      T* x, const acc_t<T>* update, const acc_t<T>* gamma, int64_t dim, acc_t<T>* wide) {  \
    add_body<T>(x, update, gamma, dim, wide);                                              \
  }                                                                                        \
  CROPR_CLONES void norm_row_##suffix(                                                     \
      const acc_t<T>* row, const Norm<acc_t<T>>& norm, int64_t dim, T* out) {              \
    norm_body<T>(row, norm, dim, out);                                                     \
  }                                                                                        \
  CROPR_CLONES void widen_row_##suffix(const T* row, int64_t dim, acc_t<T>* wide) {        \
    widen_body<T>(row, dim, wide);                                                         \
  }                                                                                        \
  template <>                                                                              \
  void add_row<T>(                                                                         \
      T * x, const acc_t<T>* update, const acc_t<T>* gamma, int64_t dim, acc_t<T>* wide) { \
    add_row_##suffix(x, update, gamma, dim, wide);                                         \
  }                                                                                        \
  template <>                                                                              \
  void norm_row<T>(const acc_t<T>* row, const Norm<acc_t<T>>& norm, int64_t dim, T* out) { \
    norm_row_##suffix(row, norm, dim, out);                                                \
  }                                                                                        \
  template <>                                                                              \
  void widen_row<T>(const T* row, int64_t dim, acc_t<T>* wide) {                           \
    widen_row_##suffix(row, dim, wide);                                                    \
  }

CROPR_ROW_KERNELS(float, f32)
CROPR_ROW_KERNELS(double, f64)
CROPR_ROW_KERNELS(bfloat16, bf16)
CROPR_ROW_KERNELS(float16, f16)

}  // namespace cropr
