#include "checks.h"

#include <string>
#include <vector>

namespace cropr {
namespace {

bool allows(Types types, ScalarType type, ScalarType first) {
  switch (types) {
    case Types::kFloat32:
      return type == ScalarType::Float;
    case Types::kInt64:
      return type == ScalarType::Long;
    case Types::kBool:
      return type == ScalarType::Bool;
    case Types::kPriority:
      return type == ScalarType::Char || type == ScalarType::Bool;
    case Types::kOfFirst:
      return type == first;
    default:
      return is_float(type);
  }
}

// Calls body(factor, letter, index) for each dimension of one alternative; returns their number.
template <typename Body>
int64_t for_each_dim(const char* shape, const Body& body) {
  int64_t count = 0;
  for (; *shape != '\0' && *shape != '|'; ++shape) {
    int64_t factor = 1;
    if (*shape >= '0' && *shape <= '9') factor = *shape++ - '0';
    body(factor, *shape, count++);
  }
  return count;
}

const char* next_alternative(const char* shape) {
  while (*shape != '\0' && *shape != '|') ++shape;
  return *shape == '|' ? shape + 1 : nullptr;
}

// Matches sizes to a shape; if they fit, dims receives the sizes of its letters.
bool fits(const char* shape, const int64_t* sizes, int64_t rank, Dims& dims) {
  if (for_each_dim(shape, [](int64_t, char, int64_t) {}) != rank) return false;
  Dims extended = dims;
  bool matches = true;
  for_each_dim(shape, [&](int64_t factor, char letter, int64_t i) {
    int64_t& size = extended[letter];
    if (size < 0) size = sizes[i];
    matches = matches && sizes[i] == factor * size;
  });
  if (matches) dims = extended;
  return matches;
}

// A shape as text, with the sizes that are known: "(B = 2, K) or (M, 2 C = 8)".
std::string expected(const char* shape, const Dims& dims) {
  std::ostringstream text;
  for (const char* sep = ""; shape != nullptr; shape = next_alternative(shape), sep = " or ") {
    text << sep << "(";
    const int64_t count = for_each_dim(shape, [&](int64_t factor, char letter, int64_t i) {
      text << (i ? ", " : "");
      if (factor > 1) text << factor << " ";
      text << letter;
      if (dims[letter] >= 0) text << " = " << factor * dims[letter];
    });
    text << (count == 1 ? ",)" : ")");
  }
  return text.str();
}

std::string strides_of(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.stride(i);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

void check_input(
    const Op& op, const Input& input, const Tensor& tensor, ScalarType first, Dims& dims) {
  if (!tensor.is_cpu())
    fail(name_of(op), ": ", input.name, " must be on the same device as the other tensors, cpu");
  const ScalarType type = tensor.scalar_type();
  if (!allows(input.types, type, first))
    fail(
        name_of(op), ": ", input.name, " must be ", kTypeNames[static_cast<int>(input.types)],
        input.types == Types::kOfFirst ? std::string(", ") + dtype_name(first) : "", ", got ",
        dtype_name(type));
  int64_t* sizes;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_sizes(tensor.get(), &sizes));  // one call into libtorch for all
  const int64_t rank = tensor.dim();
  bool fits_shape = false;
  for (const char* shape = input.shape; shape != nullptr && !fits_shape;
       shape = next_alternative(shape))
    fits_shape = fits(shape, sizes, rank, dims);
  if (!fits_shape)
    fail(
        name_of(op), ": ", input.name, " must have shape ", expected(input.shape, dims), ", got ",
        shape_of(tensor));
  if (input.layout == Layout::kContiguous && !tensor.is_contiguous())
    fail(
        name_of(op), ": ", input.name, " must be contiguous, as it changes in place, got strides ",
        strides_of(tensor));
  if (input.layout == Layout::kDenseRows && sizes[rank - 1] > 1 && tensor.stride(rank - 1) != 1)
    fail(
        name_of(op), ": ", input.name,
        " must have a stride of 1 in the last dimension, as it changes in place, got strides ",
        strides_of(tensor));
  if (input.layout == Layout::kDenseRows)
    for (int64_t i = 0; i < rank; ++i)
      if (sizes[i] > 1 && tensor.stride(i) == 0)
        fail(
            name_of(op), ": ", input.name,
            " must not be expanded, as it changes in place, got strides ", strides_of(tensor));
}

// The memory range of a tensor, in bytes.
struct Extent {
  const char *begin = nullptr, *end = nullptr;

  explicit Extent(const Tensor& tensor) {
    int64_t *sizes, *strides;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      if (sizes[i] == 0) return;
      last += (sizes[i] - 1) * strides[i];
    }
    begin = static_cast<const char*>(tensor.const_data_ptr());
    end = begin + (last + 1) * element_size(tensor.scalar_type());
  }
};

int64_t bound(const char* sum, const Dims& dims, int64_t previous) {
  if (*sum >= 'a' && *sum <= 'z') return previous;
  int64_t value = 0;
  for (; *sum != '\0'; ++sum)
    if (*sum >= 'A' && *sum <= 'Z') value += dims[*sum];
  return value;
}

}  // namespace

void check_overlap(const Op& op, std::span<const Tensor* const> tensors) {
  const Input* input = op.inputs;
  for (const Tensor* changed : tensors) {
    if (changed != nullptr && input->layout != Layout::kAny) {
      const Extent written(*changed);
      const Input* tensor_input = op.inputs;
      for (const Tensor* tensor : tensors) {
        if (tensor != nullptr && tensor != changed) {
          const Extent extent(*tensor);
          if (extent.begin < written.end && written.begin < extent.end)
            fail(
                name_of(op), ": ", tensor_input->name, " must not share memory with ", input->name,
                ", which changes in place");
        }
        ++tensor_input;
      }
    }
    ++input;
  }
}

Dims check(
    const Op& op, std::initializer_list<const Tensor*> tensors,
    std::initializer_list<int64_t> numbers) {
  Dims dims;
  const Input* input = op.inputs;
  const ScalarType first = (*tensors.begin())->scalar_type();
  for (const Tensor* tensor : tensors) {
    if (tensor != nullptr)
      check_input(op, *input, *tensor, first, dims);
    else
      for_each_dim(input->shape, [&](int64_t, char letter, int64_t) {
        if (dims[letter] < 0) dims[letter] = dims['N'];
      });
    ++input;
  }
  int64_t previous = 0;
  const Range* range = op.ranges;
  for (const int64_t value : numbers) {
    const int64_t low = bound(range->low, dims, previous),
                  high = bound(range->high, dims, previous);
    if (value < low || value > high)
      fail(
          name_of(op), ": ", range->name, " must be in [", range->low, ", ", range->high, "] = [",
          low, ", ", high, "], got ", value);
    previous = value;
    ++range;
  }
  check_overlap(op, {tensors.begin(), tensors.size()});
  return dims;
}

void check_positions(const Op& op, const char* name, const int64_t* idx, int64_t count, int64_t n) {
  for (int64_t i = 0; i < count; ++i)
    if (idx[i] < 0 || idx[i] >= n)
      fail(name_of(op), ": ", name, " must hold positions in [0, ", n, "), got ", idx[i]);
}

void check_positions_once(
    const Op& op, const char* names, const int64_t* first, int64_t num_first, const int64_t* second,
    int64_t num_second, int64_t batch, int64_t n) {
  std::vector<int64_t> last_image(n, -1);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < num_first + num_second; ++i) {
      const int64_t position =
          i < num_first ? first[b * num_first + i] : second[b * num_second + i - num_first];
      if (position < 0 || position >= n || last_image[position] == b)
        fail(
            name_of(op), ": ", names, " must together hold each position in [0, ", n,
            ") once, got ", position, position < 0 || position >= n ? "" : " twice", " in image ",
            b);
      last_image[position] = b;
    }
  }
}

}  // namespace cropr
