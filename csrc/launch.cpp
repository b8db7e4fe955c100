// cropr_replay::OP repeats what op OP did on CUDA for arguments of the same dtypes, sizes, strides
// and alignments, if Python has recorded it; `replayed` tells whether it had.
#include "launch.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <bit>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "checks.h"

namespace cropr {
namespace {

constexpr size_t kMaxArguments = 13, kMaxParameters = 48, kMaxRecordings = 4096;

// Functions of the CUDA driver and of libtorch_cuda, looked up by load_driver.
struct Driver {
  int (*launch)(
      void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
      void**);
  int (*fill)(void*, unsigned char, size_t, void*);
  int (*describe)(int, const char**);
  AOTITorchError (*stream)(int32_t, void**);
} driver;

std::shared_mutex mutex;  // guards recordings
std::unordered_map<std::string, std::shared_ptr<const RecordedLaunches>> recordings;
thread_local bool has_replayed = false;  // the last call of this thread
thread_local std::string missed;         // the key of that call, if it was not replayed

template <typename F>
void look_up(F& function, void* library, const char* name) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (function == nullptr) fail("cropr: ", name, " is missing: ", dlerror());
}

void succeed(int error, const char* action) {
  if (error == 0) return;
  const char* text = "unknown error";
  driver.describe(error, &text);
  fail("cropr: ", action, " failed: ", text);
}

template <typename T>
void append(std::string& key, const T* values, size_t count) {
  key.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

// Appends every property of a tensor that decides which kernels run and how: not its address, but
// the first argument that has the same one.
void append_tensor(
    std::string& key, AtenTensorHandle tensor, std::array<void*, kMaxArguments>& addresses,
    size_t index) {
  int32_t dtype, device;
  int64_t rank, *sizes, *strides;
  void* address;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &rank));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &address));
  addresses[index] = address;
  const auto first_same =
      std::find(addresses.begin(), addresses.end(), address) - addresses.begin();
  const auto alignment = static_cast<int32_t>(std::bit_cast<uintptr_t>(address) % 16);
  const int32_t properties[] = {
      dtype, device, static_cast<int32_t>(rank), alignment, static_cast<int32_t>(first_same)};
  append(key, properties, std::size(properties));
  append(key, sizes, rank);
  append(key, strides, rank);
}

enum class Kind { kTensor, kOptionalTensor, kNumber, kOptionalFloat };

// The arguments of a schema, in its order.
struct Arguments {
  std::array<Kind, kMaxArguments> kinds;
  std::array<std::string_view, kMaxArguments> names;
  size_t count = 0;

  explicit Arguments(std::string_view schema) {
    std::string_view rest = schema.substr(schema.find('(') + 1);
    rest = rest.substr(0, rest.find(") ->"));
    while (!rest.empty()) {
      if (count == kMaxArguments)
        fail("cropr: an op takes more than ", kMaxArguments, " arguments");
      const size_t comma = std::min(rest.find(", "), rest.size()), space = rest.find(' ');
      const std::string_view type = rest.substr(0, space);
      names[count] = rest.substr(space + 1, rest.find_first_of(",=)", space) - space - 1);
      kinds[count++] = type == "float?"              ? Kind::kOptionalFloat
                       : !type.starts_with("Tensor") ? Kind::kNumber
                       : type.ends_with('?')         ? Kind::kOptionalTensor
                                                     : Kind::kTensor;
      rest.remove_prefix(std::min(comma + 2, rest.size()));
    }
  }
};

// The tensor that an entry of the stack holds; the stack no longer owns it.
OptionalTensor take(Kind kind, StableIValue value) {
  if (kind == Kind::kNumber || kind == Kind::kOptionalFloat) return std::nullopt;
  if (kind == Kind::kOptionalTensor) return torch::stable::detail::to<OptionalTensor>(value);
  return torch::stable::detail::to<Tensor>(value);
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device, &handle_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    aoti_torch_delete_device_guard(handle_);
  }

 private:
  DeviceGuardHandle handle_ = nullptr;
};

using Tensors = std::array<OptionalTensor, kMaxArguments>;

// Repeats the recorded allocations and launches for these arguments; results go to the stack.
void replay(
    const RecordedLaunches& recorded, const Op& op, const Arguments& arguments,
    const Tensors& tensors, StableIValue* stack) {
  std::array<const Tensor*, std::size(Op{}.inputs)> inputs{};
  for (size_t i = 0; i < inputs.size() && op.inputs[i].name != nullptr; ++i)
    for (size_t j = 0; j < arguments.count; ++j)
      if (arguments.names[j] == op.inputs[i].name) inputs[i] = ptr_or_null(tensors[j]);
  check_overlap(op, inputs);

  int32_t type, device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensors[0]->get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensors[0]->get(), &device));
  void* stream = nullptr;
  std::optional<DeviceGuard> guard;
  if (type == aoti_torch_device_type_cuda()) {
    guard.emplace(device);
    STABLE_TORCH_ERROR_CODE_CHECK(driver.stream(device, &stream));
  }
  std::vector<Output> allocated;
  allocated.reserve(recorded.allocations.size());
  for (const Allocation& allocation : recorded.allocations) {
    const Output& output = allocated.emplace_back(allocation.sizes, allocation.dtype, type, device);
    if (allocation.zero_bytes)
      succeed(driver.fill(output.data<char>(), 0, allocation.zero_bytes, stream), "a memset");
  }
  for (const Launch& launch : recorded.launches) {
    std::array<uint64_t, kMaxParameters> values;
    std::array<void*, kMaxParameters> pointers;
    for (size_t i = 0; i < launch.parameters.size(); ++i) {
      const Parameter& parameter = launch.parameters[i];
      const char* base = nullptr;
      if (parameter.kind == Parameter::kArgument) base = data<char>(*tensors[parameter.index]);
      if (parameter.kind == Parameter::kAllocation) base = allocated[parameter.index].data<char>();
      values[i] = std::bit_cast<uint64_t>(base) +
                  parameter.value;  // of a number of four bytes the first four
      pointers[i] = &values[i];
    }
    succeed(
        driver.launch(
            std::bit_cast<void*>(launch.function), launch.grid, 1, 1, launch.threads, 1, 1,
            launch.shared, stream, pointers.data(), nullptr),
        "a launch");
  }
  for (size_t i = 0; i < recorded.outputs.size(); ++i)
    stack[i] = allocated[recorded.outputs[i]].release();
}

template <size_t kOp>
void run(StableIValue* stack, uint64_t, uint64_t num_outputs) {
  static const Arguments arguments(kOps[kOp].schema);
  Tensors tensors;
  std::array<void*, kMaxArguments> addresses{};
  std::string key(1, static_cast<char>(kOp));
  for (size_t i = 0; i < arguments.count; ++i) {
    tensors[i] = take(arguments.kinds[i], stack[i]);
    key += tensors[i] ? 'T' : '-';
    if (tensors[i]) {
      append_tensor(key, tensors[i]->get(), addresses, i);
    } else if (arguments.kinds[i] == Kind::kOptionalFloat) {  // the entry is a pointer
      const auto value = torch::stable::detail::to<std::optional<double>>(stack[i]);
      const double number = value.value_or(0.0);
      key += value ? '1' : '0';
      append(key, &number, 1);
    } else {
      append(key, &stack[i], 1);
    }
  }
  std::shared_ptr<const RecordedLaunches> recorded;
  {
    const std::shared_lock lock(mutex);
    const auto entry = recordings.find(key);
    if (entry != recordings.end()) recorded = entry->second;
  }
  has_replayed = recorded != nullptr;
  if (recorded != nullptr)
    replay(*recorded, kOps[kOp], arguments, tensors, stack);
  else
    for (size_t i = 0; i < num_outputs; ++i) stack[i] = Output({0}, ScalarType::Float).release();
  missed = recorded != nullptr ? std::string() : std::move(key);
}

template <size_t... kOp>
void register_all(torch::stable::detail::StableLibrary& library, std::index_sequence<kOp...>) {
  (library.impl(std::string(name_of(kOps[kOp])).c_str(), &run<kOp>), ...);
}

}  // namespace

int32_t dtype_named(const std::string& name) {
  if (name == "float32") return aoti_torch_dtype_float32();
  if (name == "float64") return aoti_torch_dtype_float64();
  if (name == "bfloat16") return aoti_torch_dtype_bfloat16();
  if (name == "float16") return aoti_torch_dtype_float16();
  if (name == "int64") return aoti_torch_dtype_int64();
  if (name == "int32") return aoti_torch_dtype_int32();
  fail("cropr: recorded launches cannot allocate ", name);
}

void keep_launches(RecordedLaunches recorded) {
  for (const Launch& launch : recorded.launches)
    if (launch.parameters.size() > kMaxParameters)
      fail("cropr: a kernel takes more than ", kMaxParameters, " arguments");
  if (missed.empty()) return;
  const std::unique_lock lock(mutex);
  if (recordings.size() >= kMaxRecordings) recordings.clear();
  recordings[std::exchange(missed, {})] =
      std::make_shared<const RecordedLaunches>(std::move(recorded));
}

void forget_launches() {
  const std::unique_lock lock(mutex);
  recordings.clear();
}

bool replayed() {
  return has_replayed;
}

void load_driver(const std::string& path) {
  static std::once_flag loaded;  // later calls change nothing that other threads read
  std::call_once(loaded, [&path] {
    void* cuda = dlopen(path.c_str(), RTLD_LAZY);
    if (cuda == nullptr) fail("cropr: the CUDA driver does not load: ", dlerror());
    look_up(driver.launch, cuda, "cuLaunchKernel");
    look_up(driver.fill, cuda, "cuMemsetD8Async");
    look_up(driver.describe, cuda, "cuGetErrorString");
    void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch != nullptr) look_up(driver.stream, torch, "aoti_torch_get_current_cuda_stream");
  });
}

STABLE_TORCH_LIBRARY(cropr_replay, library) {
  for (const Op& op : kOps) library.def(op.schema);
}
STABLE_TORCH_LIBRARY_IMPL(cropr_replay, CompositeExplicitAutograd, library) {
  register_all(library, std::make_index_sequence<std::size(kOps)>{});
}

}  // namespace cropr
