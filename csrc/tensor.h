// Access to libtorch through its stable ABI: views, outputs, dtype dispatch, errors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "row_kernels.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // the older name
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace cropr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Bool:
      return "bool";
    default:
      return toString(type);
  }
}

inline int64_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Char:
    case ScalarType::Bool:
      return 1;
    default:
      return 4;
  }
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// A returned tensor in the form that the dispatcher's stack holds.
using Returned = StableIValue;

// A new contiguous tensor. release() passes its handle to the dispatcher; returning a Tensor would
// allocate a second handle, a good part of the time of a small op.
class Output {
 public:
  // A tensor on the CPU.
  Output(std::initializer_list<int64_t> sizes, ScalarType type)
      : Output(
            {sizes.begin(), sizes.size()},
            torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
            aoti_torch_device_type_cpu(), 0) {}
  // A tensor of a dtype and a device as libtorch numbers them.
  Output(std::span<const int64_t> sizes, int32_t dtype, int32_t device_type, int32_t device_index) {
    const int64_t dim = static_cast<int64_t>(sizes.size());
    int64_t strides[4];
    int64_t step = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
      strides[i] = step;
      step *= std::max<int64_t>(sizes[i], 1);
    }
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        dim, sizes.data(), strides, dtype, device_type, device_index, &handle_));
  }
  Output(Output&& moved) noexcept : handle_(std::exchange(moved.handle_, nullptr)) {}
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  template <typename T>
  T* data() const {
    void* pointer;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_, &pointer));
    return static_cast<T*>(pointer);
  }
  Returned release() {
    return torch::stable::detail::from(std::exchange(handle_, nullptr));
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::detail::to<Tensor>(Output(sizes, type).release());
}

// Returns x with dense rows; every other stride stays as it is.
inline Tensor with_dense_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) > 1 && x.stride(last) != 1 ? torch::stable::contiguous(x) : x;
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls body(T{}) with the C++ type of a floating dtype that check accepts.
template <typename Body>
auto with_float_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(bfloat16{});
    case ScalarType::Half:
      return body(float16{});
    default:
      return body(float{});
  }
}

}  // namespace cropr
