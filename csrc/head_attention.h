// Attention of one head within one image, on raw pointers.
//
// Keys and values are packed once into panels of kPanel keys or channels; then each block of
// queries reads them from a cache. Everything runs in the accumulation type.
#pragma once

#include "row_kernels.h"

namespace cropr {

// Keys of a panel, or channels: two vectors.
template <typename A>
constexpr int64_t kPanel = 2 * kLanes<A>;
template <typename A>
constexpr int64_t padded(int64_t count) {
  return (count + kPanel<A> - 1) / kPanel<A> * kPanel<A>;
}

// Queries of a block: their sums of one panel fill the registers.
constexpr int kQueryBlock = 6;

// Rows of a head: channel d of token i is data[i * stride + d].
template <typename T>
struct HeadRows {
  T* data;
  int64_t stride;
};

// Working memory of one head with `count` keys of `width` channels.
template <typename A>
struct PackedHead {
  int64_t count, width;
  A *keys, *values, *bias, *logits, *queries;

  static int64_t elements(int64_t count, int64_t width) {
    return padded<A>(count) * (width + 1 + kQueryBlock) + padded<A>(width) * count +
           kQueryBlock * width;
  }
  PackedHead(int64_t count_, int64_t width_, A* memory)
      : count(count_),
        width(width_),
        keys(memory),
        values(keys + padded<A>(count) * width),
        bias(values + padded<A>(width) * count),
        logits(bias + padded<A>(count)),
        queries(logits + kQueryBlock * padded<A>(count)) {}
};

// log_sizes (count,) are added to logits; may be null.
template <typename T>
void pack_head(
    HeadRows<const T> keys, HeadRows<const T> values, const float* log_sizes,
    const PackedHead<acc_t<T>>& head);

// out[i] = softmax(scale * q[i] . keys + log_sizes) . values, for i < num_queries.
template <typename T>
void attend_head(
    HeadRows<const T> queries, int64_t num_queries, acc_t<T> scale,
    const PackedHead<acc_t<T>>& head, HeadRows<T> out);

}  // namespace cropr
