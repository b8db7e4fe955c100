// Rows of token tensors: views, ranges for threads, scores, copies.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "row_kernels.h"
#include "tensor.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace cropr {

// Elements a thread should have at least: below this, waking it costs more than it saves.
constexpr int64_t kGrainElements = 16384;

inline int64_t row_grain(int64_t dim) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, dim));
}

// The dense (B, N, D) view a kernel works on; element strides.
template <typename T>
struct Rows {
  const T* data;
  int64_t batch, count, dim, stride_b, stride_n;

  explicit Rows(const Tensor& x)
      : data(cropr::data<T>(x)),
        batch(x.size(0)),
        count(x.size(1)),
        dim(x.size(2)),
        stride_b(x.stride(0)),
        stride_n(x.stride(1)) {}

  const T* image(int64_t b) const {
    return data + b * stride_b;
  }
};

// sum_m query[m]: the score is linear in the queries, so all of them act as one vector.
template <typename A>
void fold_query(const Tensor& query, A* folded) {
  const Tensor dense = with_dense_rows(query);
  const int64_t dim = dense.size(dense.dim() - 1);
  const int64_t count = dense.dim() == 2 ? dense.size(0) : 1;
  const int64_t stride = dense.dim() == 2 ? dense.stride(0) : 0;
  with_float_type(dense.scalar_type(), [&](auto tag) {
    using Q = decltype(tag);
    const Q* rows = data<Q>(dense);
    if (count == 1) {
      for (int64_t d = 0; d < dim; ++d) folded[d] = static_cast<A>(load_one(rows + d));
      return;
    }
    const std::vector<acc_t<Q>> ones(count, acc_t<Q>(1));
    std::vector<acc_t<Q>> sum(dim, acc_t<Q>(0));
    weighted_sum<Q>(rows, stride, count, dim, ones.data(), sum.data());
    std::copy(sum.begin(), sum.end(), folded);
  });
}

// Scores are float32 for every input: in bfloat16 they would tie often.
template <typename T>
void score_rows(
    const T* x, int64_t stride, int64_t rows, int64_t dim, const acc_t<T>* query, float* out) {
  if constexpr (std::is_same_v<acc_t<T>, float>) {
    dot_rows<T>(x, stride, rows, dim, query, out);
  } else {
    Scratch<acc_t<T>> wide(rows);
    dot_rows<T>(x, stride, rows, dim, query, wide.data());
    std::copy_n(wide.data(), rows, out);
  }
}

// Calls body(b, first, last) so that flat rows [begin, end) of (B, rows_per_image) are each visited
// once.
template <typename Body>
void for_each_image_range(int64_t begin, int64_t end, int64_t rows_per_image, const Body& body) {
  while (begin < end) {
    const int64_t b = begin / rows_per_image, first = begin % rows_per_image;
    const int64_t last = std::min(rows_per_image, first + (end - begin));
    body(b, first, last);
    begin += last - first;
  }
}

template <typename T>
void score_batch(const Rows<T>& x, const acc_t<T>* query, float* out) {
  torch::stable::parallel_for(
      0, x.batch * x.count, row_grain(x.dim), [&](int64_t begin, int64_t end) {
        for_each_image_range(begin, end, x.count, [&](int64_t b, int64_t first, int64_t last) {
          const T* rows = x.image(b) + first * x.stride_n;
          score_rows<T>(rows, x.stride_n, last - first, x.dim, query, out + b * x.count + first);
        });
      });
}

// Outputs of at least this size are written with non-temporal stores: the first rows would be
// evicted before they are read, and the lines need not be fetched first. Smaller outputs stay in a
// cache for their reader. Measured with a LayerNorm after prune: 5 to 11 % less time for both at 8
// to 50 MB, 2 to 3 % more at 5 to 6 MB.
constexpr int64_t kPastCachesBytes = 8 << 20;

inline void copy_past_caches(const char* from, int64_t bytes, char* to) {
#if defined(__SSE2__)
  constexpr int64_t line = 64;
  const int64_t lead = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & (line - 1));
  std::memcpy(to, from, lead);
  int64_t i = lead;
  for (; i + line <= bytes; i += line)
    for (int64_t part = i; part < i + line; part += 16)
      _mm_stream_si128(
          reinterpret_cast<__m128i*>(to + part),
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part)));
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

// Copies the rows of one call, past the caches if the output is large. Each thread calls finish()
// after its last copy, before another thread reads.
class RowCopy {
 public:
  explicit RowCopy(int64_t bytes) : past_caches_(bytes >= kPastCachesBytes) {}

  template <typename T>
  void operator()(const T* from, int64_t count, T* to) const {
    if (past_caches_)
      copy_past_caches(
          reinterpret_cast<const char*>(from), count * sizeof(T), reinterpret_cast<char*>(to));
    else
      std::copy_n(from, count, to);
  }
  void finish() const {
#if defined(__SSE2__)
    if (past_caches_) _mm_sfence();
#endif
  }

 private:
  bool past_caches_;
};

// Length of the run of consecutive positions that starts at idx[i]: such rows are copied in one go.
inline int64_t run_length(const int64_t* idx, int64_t i, int64_t count) {
  int64_t length = 1;
  while (i + length < count && idx[i + length] == idx[i] + length) ++length;
  return length;
}

// out[i] = x[idx[i]] for i in [first, last)
template <typename T>
void gather_rows(
    const T* x, int64_t stride_n, int64_t dim, const int64_t* idx, int64_t first, int64_t last,
    T* out, const RowCopy& copy) {
  for (int64_t i = first; i < last;) {
    const int64_t rows = stride_n == dim ? run_length(idx, i, last) : 1;
    copy(x + idx[i] * stride_n, rows * dim, out + i * dim);
    i += rows;
  }
  copy.finish();
}

// row -= subtrahend, rounded once; scratch holds 2 * dim.
template <typename T>
void subtract_row(T* row, const T* subtrahend, int64_t dim, acc_t<T>* scratch) {
  widen_row<T>(subtrahend, dim, scratch);
  for (int64_t d = 0; d < dim; ++d) scratch[d] = -scratch[d];
  add_row<T>(row, scratch, nullptr, dim, scratch + dim);
}

// Priorities of tokens (B, N), int8 or bool: positive ones are kept, negative ones pruned before
// scores count. Null if absent.
class Priority {
 public:
  Priority(const OptionalTensor& priority, int64_t n) : n_(n) {
    if (!priority) return;
    dense_ = torch::stable::contiguous(*priority);
    values_ = static_cast<const int8_t*>(dense_.const_data_ptr());
  }
  const int8_t* image(int64_t b) const {
    return values_ == nullptr ? nullptr : values_ + b * n_;
  }

 private:
  Tensor dense_;
  const int8_t* values_ = nullptr;
  int64_t n_;
};

}  // namespace cropr
