// Whether the arguments of a call are what library.h says; cropr_kernels/ops/validation.py says the same of others.
#pragma once

#include <array>
#include <initializer_list>
#include <optional>
#include <span>

#include "library.h"
#include "tensor.h"

namespace cropr {

using OptionalTensor = std::optional<Tensor>;

inline const Tensor* given(const OptionalTensor& tensor) {
  return tensor ? &*tensor : nullptr;
}

// Sizes by their letters.
class Dims {
 public:
  Dims() {
    sizes_.fill(-1);  // not known
  }
  int64_t& operator[](char letter) {
    return sizes_[letter - 'B'];
  }
  int64_t operator[](char letter) const {
    return sizes_[letter - 'B'];
  }

 private:
  std::array<int64_t, 'S' - 'B' + 1> sizes_;
};

// Tensors in the order of op.inputs, null where one is left out, and numbers in the order of op.ranges. The first
// argument that is not what it must be is refused in one sentence.
Dims check(const Op& op, std::initializer_list<const Tensor*> tensors, std::initializer_list<int64_t> numbers = {});

// What changes in place shares memory with nothing else that the op reads or writes; tensors as for check.
void check_overlap(const Op& op, std::span<const Tensor* const> tensors);

// Every index in [0, n), so that no kernel leaves its buffers.
void check_positions(const Op& op, const char* name, const int64_t* idx, int64_t count, int64_t n);

// The two lists together hold each position of an image at most once; where they hold n, that is exactly once.
void check_positions_once(
    const Op& op, const char* names, const int64_t* one, int64_t num_one, const int64_t* other, int64_t num_other,
    int64_t batch, int64_t n);

}  // namespace cropr
