#include "head_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace cropr {
namespace {

template <typename A>
constexpr A kLog2E = A(1.44269504088896340736);

template <typename A>
CROPR_INLINE void store_pack(A* p, typename Pack<A>::type value) {
  std::memcpy(p, &value, sizeof(value));
}

// 2^x for x <= 0, to a few units in the last place; 0 below -126, NaN stays.
CROPR_INLINE Pack<float>::type exp2_pack(Pack<float>::type x) {
  using V = Pack<float>::type;
  constexpr float round = 0x1.8p23f;  // the sum with it has no bits for fractions
  const V low = x < -126.0f ? V{} - 126.0f : x;
  const V shifted = low + round;
  const V fraction = low - (shifted - round);
  V power = fraction * 1.5403530e-4f + 1.3333558e-3f;
  power = power * fraction + 9.6181291e-3f;
  power = power * fraction + 5.5504109e-2f;
  power = power * fraction + 2.4022651e-1f;
  power = power * fraction + 6.9314718e-1f;
  power = power * fraction + 1.0f;
  PackU32 bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000;
  V scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return x < -126.0f ? V{} : power * scale;
}
CROPR_INLINE Pack<double>::type exp2_pack(Pack<double>::type x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// Panel p holds key p * kPanel + j at [c][j], zero past the last.
template <typename T>
CROPR_INLINE void pack_keys(HeadRows<const T> rows, const PackedHead<acc_t<T>>& head) {
  using A = acc_t<T>;
  constexpr int64_t panel = kPanel<A>;
  A* to = head.keys;
  for (int64_t first = 0; first < head.count; first += panel) {
    const int64_t present = std::min(panel, head.count - first);
    const T* from = rows.data + first * rows.stride;
    for (int64_t c = 0; c < head.width; ++c, to += panel) {
      for (int64_t j = 0; j < present; ++j) to[j] = load_one(from + j * rows.stride + c);
      for (int64_t j = present; j < panel; ++j) to[j] = 0;
    }
  }
}

// Panel p holds channel p * kPanel + c at [j][c], zero past the last.
template <typename T>
CROPR_INLINE void pack_values(HeadRows<const T> rows, const PackedHead<acc_t<T>>& head) {
  using A = acc_t<T>;
  constexpr int64_t panel = kPanel<A>;
  A* to = head.values;
  for (int64_t first = 0; first < head.width; first += panel) {
    const int64_t present = std::min(panel, head.width - first);
    const T* from = rows.data + first;
    for (int64_t j = 0; j < head.count; ++j, to += panel, from += rows.stride) {
      if (present == panel) {
        for (int64_t c = 0; c < panel; ++c) to[c] = load_one(from + c);
      } else {
        for (int64_t c = 0; c < panel; ++c) to[c] = c < present ? load_one(from + c) : A(0);
      }
    }
  }
}

template <typename T>
CROPR_INLINE void pack_body(
    HeadRows<const T> keys, HeadRows<const T> values, const float* log_sizes,
    const PackedHead<acc_t<T>>& head) {
  using A = acc_t<T>;
  pack_keys<T>(keys, head);
  pack_values<T>(values, head);
  for (int64_t j = 0; j < head.count; ++j)
    head.bias[j] = log_sizes ? log_sizes[j] * kLog2E<A> : A(0);
  std::fill(
      head.bias + head.count, head.bias + padded<A>(head.count),
      -std::numeric_limits<A>::infinity());
}

// sums[r] of a panel += sum_i factors[r * stride + i] * rows[i], for i < count; in parts, as one
// long chain of additions rounds more.
template <typename A, int block>
CROPR_INLINE void multiply_panel(
    const A* factors, int64_t stride, const A* rows, int64_t count,
    typename Pack<A>::type (&sums)[block][2]) {
  using V = typename Pack<A>::type;
  constexpr int lanes = kLanes<A>;
  constexpr int64_t part = 128;
  for (int64_t first = 0; first < count; first += part) {
    const int64_t last = std::min(count, first + part);
    V added[block][2] = {};
    for (int64_t i = first; i < last; ++i, rows += 2 * lanes) {
      const V left = load_pack(rows), right = load_pack(rows + lanes);
#pragma GCC unroll 6
      for (int r = 0; r < block; ++r) {
        const A factor = factors[r * stride + i];
        added[r][0] += factor * left;
        added[r][1] += factor * right;
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < block; ++r) {
      sums[r][0] += added[r][0];
      sums[r][1] += added[r][1];
    }
  }
}

// Turns logits in base 2 into powers of 2 relative to the highest; returns their sum.
template <typename A>
CROPR_INLINE A exponentiate(A* logits, int64_t count) {
  using V = typename Pack<A>::type;
  constexpr int lanes = kLanes<A>;
  V highest = load_pack(logits);
  for (int64_t j = lanes; j < count; j += lanes) {
    const V value = load_pack(logits + j);
    highest = value > highest ? value : highest;
  }
  A top = highest[0];
  for (int i = 1; i < lanes; ++i) top = std::max(top, highest[i]);
  V sums = {};
  for (int64_t j = 0; j < count; j += lanes) {
    const V power = exp2_pack(load_pack(logits + j) - top);
    store_pack(logits + j, power);
    sums += power;
  }
  A sum = 0;
  for (int i = 0; i < lanes; ++i) sum += sums[i];
  return sum;
}

template <typename T, int block>
CROPR_INLINE void attend_block(
    HeadRows<const T> queries, int64_t present, acc_t<T> scale, const PackedHead<acc_t<T>>& head,
    HeadRows<T> out) {
  using A = acc_t<T>;
  using V = typename Pack<A>::type;
  constexpr int lanes = kLanes<A>;
  constexpr int64_t panel = kPanel<A>;
  const int64_t columns = padded<A>(head.count);
  for (int64_t r = 0; r < block; ++r)
    for (int64_t c = 0; c < head.width; ++c)
      head.queries[r * head.width + c] =
          r < present ? load_one(queries.data + r * queries.stride + c) * scale : A(0);
  for (int64_t j = 0; j < columns; j += panel) {
    V sums[block][2] = {};
    multiply_panel<A, block>(
        head.queries, head.width, head.keys + j * head.width, head.width, sums);
    // Added last, as sums of small products lose less.
    const V left = load_pack(head.bias + j), right = load_pack(head.bias + j + lanes);
    for (int r = 0; r < block; ++r) {
      store_pack(head.logits + r * columns + j, sums[r][0] + left);
      store_pack(head.logits + r * columns + j + lanes, sums[r][1] + right);
    }
  }
  A weight[block];
  for (int r = 0; r < block; ++r)
    weight[r] = A(1) / exponentiate(head.logits + r * columns, columns);
  for (int64_t c = 0; c < head.width; c += panel) {
    V sums[block][2] = {};
    multiply_panel<A, block>(head.logits, columns, head.values + c * head.count, head.count, sums);
    const int64_t width = std::min(panel, head.width - c);
    for (int64_t r = 0; r < present; ++r) {
      alignas(kPackBytes) A row[panel];
      for (int u = 0; u < 2; ++u) store_pack(row + u * lanes, sums[r][u] * weight[r]);
      for (int64_t d = 0; d < width; ++d) store_one(out.data + r * out.stride + c + d, row[d]);
    }
  }
}

template <typename T>
CROPR_INLINE void attend_body(
    HeadRows<const T> queries, int64_t num_queries, acc_t<T> scale,
    const PackedHead<acc_t<T>>& head, HeadRows<T> out) {
  scale *= kLog2E<acc_t<T>>;
  for (int64_t i = 0; i < num_queries; i += kQueryBlock) {
    const int64_t present = std::min<int64_t>(kQueryBlock, num_queries - i);
    const HeadRows<const T> from{queries.data + i * queries.stride, queries.stride};
    const HeadRows<T> to{out.data + i * out.stride, out.stride};
    if (present > 4)
      attend_block<T, 6>(from, present, scale, head, to);
    else if (present > 2)
      attend_block<T, 4>(from, present, scale, head, to);
    else
      attend_block<T, 2>(from, present, scale, head, to);
  }
}

}  // namespace

#define CROPR_HEAD_ATTENTION(T, suffix)                                         \
  CROPR_CLONES void pack_head_##suffix(                                         \
      HeadRows<const T> keys, HeadRows<const T> values, const float* log_sizes, \
      const PackedHead<acc_t<T>>& head) {                                       \
    pack_body<T>(keys, values, log_sizes, head);                                \
  }                                                                             \
  CROPR_CLONES void attend_head_##suffix(                                       \
      HeadRows<const T> queries, int64_t num_queries, acc_t<T> scale,           \
      const PackedHead<acc_t<T>>& head, HeadRows<T> out) {                      \
    attend_body<T>(queries, num_queries, scale, head, out);                     \
  }                                                                             \
  template <>                                                                   \
  void pack_head<T>(                                                            \
      HeadRows<const T> keys, HeadRows<const T> values, const float* log_sizes, \
      const PackedHead<acc_t<T>>& head) {                                       \
    pack_head_##suffix(keys, values, log_sizes, head);                          \
  }                                                                             \
  template <>                                                                   \
  void attend_head<T>(                                                          \
      HeadRows<const T> queries, int64_t num_queries, acc_t<T> scale,           \
      const PackedHead<acc_t<T>>& head, HeadRows<T> out) {                      \
    attend_head_##suffix(queries, num_queries, scale, head, out);               \
  }

CROPR_HEAD_ATTENTION(float, f32)
CROPR_HEAD_ATTENTION(double, f64)
CROPR_HEAD_ATTENTION(bfloat16, bf16)
CROPR_HEAD_ATTENTION(float16, f16)

}  // namespace cropr
