// Row primitives on raw pointers: conversions, dot products and weighted sums.
// Vectors are compiler extensions (GCC, Clang), so one source serves every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#define CROPR_INLINE inline __attribute__((always_inline))

// One binary, several instruction sets: the loader picks the best clone for the machine.
// ThreadSanitizer is not ready when the loader asks.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define CROPR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CROPR_CLONES
#endif

namespace cropr {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Sums run in float, or in double for double inputs.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Uninitialized working memory, on the stack if it is small: in a call for one image, allocating on
// the heap would take as long as several rows.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : heap_(count > kOnStack ? new (std::align_val_t(kAlignment)) T[count] : nullptr) {}
  T* data() {
    return heap_ ? heap_.get() : stack_;
  }

 private:
  static constexpr int64_t kOnStack = 8192 / sizeof(T);
  static constexpr size_t kAlignment = 64;  // or vectors of rows cross cache lines
  struct Free {
    void operator()(T* values) const {
      ::operator delete[](values, std::align_val_t(kAlignment));
    }
  };
  std::unique_ptr<T[], Free> heap_;
  alignas(kAlignment) T stack_[kOnStack];
};

// The widest vector that lives in one register of every clone; wider ones would be kept in memory.
#if defined(__x86_64__)
constexpr int kPackBytes = 32;
#else
constexpr int kPackBytes = 16;
#endif
template <typename A>
constexpr int kLanes = kPackBytes / sizeof(A);

template <typename A>
struct Pack {
  typedef A type __attribute__((vector_size(kPackBytes)));
};
typedef uint32_t PackU32 __attribute__((vector_size(kPackBytes)));
typedef PackU32 UnalignedPackU32 __attribute__((aligned(1), may_alias));

// Half bits in the low 16 of each 32-bit lane, as float bits: the multiplication rebiases the
// exponent, which also normalizes subnormals; infinity and NaN get their exponent back.
template <typename U, typename F>
CROPR_INLINE F half_to_float(U bits) {
  U wide = ((bits & 0x8000) << 16) | ((bits & 0x7fff) << 13);
  F value;
  std::memcpy(&value, &wide, sizeof(value));
  value *= 0x1p112f;
  std::memcpy(&wide, &value, sizeof(wide));
  if constexpr (std::is_same_v<U, uint32_t>) {
    wide |= (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  } else {
    wide |= ((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  }
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

template <typename T>
CROPR_INLINE acc_t<T> load_one(const T* p) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  } else if constexpr (std::is_same_v<T, float16>) {
    return half_to_float<uint32_t, float>(p->bits);
  } else {
    return *p;
  }
}

template <typename A>
CROPR_INLINE typename Pack<A>::type load_pack(const A* p) {
  typename Pack<A>::type value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

// A group is two packs of consecutive elements. 16-bit types are split into even and odd elements,
// which costs a shift and a mask where a widening load would cost a shuffle.
template <typename T>
constexpr int kGroup = 2 * kLanes<acc_t<T>>;
template <typename T>
constexpr bool kInterleaved = sizeof(T) == 2;

template <typename T>
CROPR_INLINE void load_group(
    const T* p, typename Pack<acc_t<T>>::type& first, typename Pack<acc_t<T>>::type& second) {
  if constexpr (kInterleaved<T>) {
    // volatile: one load. Folded into the shift and again into the mask it would be two, and loads
    // are the limit.
    const PackU32 raw = *reinterpret_cast<const volatile UnalignedPackU32*>(p);
    if constexpr (std::is_same_v<T, bfloat16>) {
      const PackU32 even = raw << 16, odd = raw & 0xffff0000;
      std::memcpy(&first, &even, sizeof(first));
      std::memcpy(&second, &odd, sizeof(second));
    } else {
      first = half_to_float<PackU32, Pack<float>::type>(raw & 0xffff);
      second = half_to_float<PackU32, Pack<float>::type>(raw >> 16);
    }
  } else {
    first = load_pack(p);
    second = load_pack(p + kLanes<T>);
  }
}

// Round to nearest even, as PyTorch does; NaN stays NaN.
template <typename T>
CROPR_INLINE void store_one(T* p, acc_t<T> value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) {
      p->bits = 0x7fc0;
    } else {
      p->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
  } else if constexpr (std::is_same_v<T, float16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    uint32_t half;
    if (bits > 0x7f800000) {
      half = 0x7e00;
    } else if (bits >= 0x477ff000) {  // rounds past the largest half
      half = 0x7c00;
    } else if (bits < 0x38800000) {  // subnormal half: let a float addition do the rounding
      const uint32_t magic_bits = 0x3f000000;
      float magic, tiny;
      std::memcpy(&magic, &magic_bits, sizeof(magic));
      std::memcpy(&tiny, &bits, sizeof(tiny));
      tiny += magic;
      std::memcpy(&bits, &tiny, sizeof(bits));
      half = bits - magic_bits;
    } else {
      half = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
    }
    p->bits = static_cast<uint16_t>(sign | half);
  } else {
    *p = value;
  }
}

// out[i] = x[i * stride : i * stride + dim] . query, for i < rows.
template <typename T>
void dot_rows(
    const T* x, int64_t stride, int64_t rows, int64_t dim, const acc_t<T>* query, acc_t<T>* out);

// out[d] += sum_i weight[i] * x[i * stride + d]
template <typename T>
void weighted_sum(
    const T* x, int64_t stride, int64_t rows, int64_t dim, const acc_t<T>* weight, acc_t<T>* out);

// One row of the residual buffer, dim elements; gamma may be null.
// x += gamma * update, rounded once; wide receives the new row.
template <typename T>
void add_row(T* x, const acc_t<T>* update, const acc_t<T>* gamma, int64_t dim, acc_t<T>* wide);

// A LayerNorm, out = (row - mean) / sqrt(variance + eps) * weight + bias, or an RMSNorm, the same
// with a mean of 0; null for a weight of 1 or a bias of 0.
template <typename A>
struct Norm {
  const A *weight, *bias;
  double eps;
  bool rms;
};
template <typename T>
void norm_row(const acc_t<T>* row, const Norm<acc_t<T>>& norm, int64_t dim, T* out);

// wide = row, in the accumulation type
template <typename T>
void widen_row(const T* row, int64_t dim, acc_t<T>* wide);

}  // namespace cropr
