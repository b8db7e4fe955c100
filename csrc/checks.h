// Checks the arguments of a call against library.h, as cropr_kernels/ops/validation.py does for
// other devices.
#pragma once

#include <array>
#include <initializer_list>
#include <optional>
#include <span>

#include "library.h"
#include "tensor.h"

namespace cropr {

using OptionalTensor = std::optional<Tensor>;

inline const Tensor* ptr_or_null(const OptionalTensor& tensor) {
  return tensor ? &*tensor : nullptr;
}

// Sizes by the letters of the table.
class Dims {
 public:
  Dims() {
    sizes_.fill(-1);  // unknown
  }
  int64_t& operator[](char letter) {
    return sizes_[letter - 'B'];
  }
  int64_t operator[](char letter) const {
    return sizes_[letter - 'B'];
  }

 private:
  std::array<int64_t, 'T' - 'B' + 1> sizes_;
};

// Takes tensors in the order of op.inputs, null for an absent one, and numbers in the order of
// op.ranges. Raises an error of one sentence for the first invalid argument.
Dims check(
    const Op& op, std::initializer_list<const Tensor*> tensors,
    std::initializer_list<int64_t> numbers = {});

// Raises an error if a tensor that changes in place shares memory with another argument; tensors as
// for check.
void check_overlap(const Op& op, std::span<const Tensor* const> tensors);

// Raises an error unless every index is in [0, n): kernels do not check bounds.
void check_positions(const Op& op, const char* name, const int64_t* idx, int64_t count, int64_t n);

// Raises an error if the two lists of an image hold a position twice; if they hold n, each is then
// held exactly once.
void check_positions_once(
    const Op& op, const char* names, const int64_t* first, int64_t num_first, const int64_t* second,
    int64_t num_second, int64_t batch, int64_t n);

}  // namespace cropr
