// The Python module `cropr_kernels._C`: importing it registers the CPU kernels; and holds facts of
// the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "launch.h"
#include "library.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#else
  return std::string("gcc ") + __VERSION__;
#endif
}

std::string instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return "x86-64-v4";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "x86-64-v3";
#endif
  return "default";
}

}  // namespace

// Without the GIL, too: kernels have no state, and launch.cpp locks what threads share.
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() =
      "CPU kernels of cropr_kernels; importing this module registers them with the PyTorch "
      "dispatcher.";
  // (schema, ((name, dtypes, shape, layout), ...), ((name, low, high), ...)) of every op.
  pybind11::list ops;
  for (const cropr::Op& op : cropr::kOps) {
    pybind11::list inputs, ranges;
    for (const cropr::Input& input : op.inputs)
      if (input.name != nullptr)
        inputs.append(
            pybind11::make_tuple(
                input.name, cropr::kTypeNames[static_cast<int>(input.types)], input.shape,
                static_cast<int>(input.layout)));
    for (const cropr::Range& range : op.ranges)
      if (range.name != nullptr)
        ranges.append(pybind11::make_tuple(range.name, range.low, range.high));
    ops.append(pybind11::make_tuple(op.schema, pybind11::tuple(inputs), pybind11::tuple(ranges)));
  }
  m.attr("ops") = pybind11::tuple(ops);
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = compiler();
        info["torch_headers"] = std::to_string(TORCH_VERSION_MAJOR) + "." +
                                std::to_string(TORCH_VERSION_MINOR) + "." +
                                std::to_string(TORCH_VERSION_PATCH);
        info["torch_abi"] = CROPR_TORCH_ABI;
        info["cpu_instruction_set"] = instruction_set();
        return info;
      },
      "Facts of this build as a dict: compiler, torch_headers, torch_abi, cpu_instruction_set.");

  // allocations (dtype, sizes, bytes to zero); launches (function, grid, threads, shared memory,
  // parameters (kind, index, value)); indices of the returned allocations.
  using Parameters = std::vector<std::tuple<int, int64_t, int64_t>>;
  m.def(
      "keep_launches",
      [](const std::vector<std::tuple<std::string, std::vector<int64_t>, size_t>>& allocations,
         const std::vector<std::tuple<uint64_t, unsigned, unsigned, unsigned, Parameters>>&
             launches,
         const std::vector<int64_t>& outputs) {
        cropr::RecordedLaunches recorded{{}, {}, outputs};
        for (const auto& [dtype, sizes, zero_bytes] : allocations)
          recorded.allocations.push_back({cropr::dtype_named(dtype), sizes, zero_bytes});
        for (const auto& [function, grid, threads, shared, parameters] : launches) {
          cropr::Launch& launch =
              recorded.launches.emplace_back(cropr::Launch{function, grid, threads, shared, {}});
          for (const auto& [kind, index, value] : parameters)
            launch.parameters.push_back({static_cast<cropr::Parameter::Kind>(kind), index, value});
        }
        cropr::keep_launches(std::move(recorded));
      },
      "Keep the launches of the last op that this thread could not replay, for similar arguments.");
  m.def("forget_launches", &cropr::forget_launches, "Forget all recorded launches.");
  m.def(
      "replayed", &cropr::replayed,
      "Tell if the last op of cropr_replay in this thread had recorded launches.");
  m.def("load_driver", &cropr::load_driver, "Load the CUDA driver that repeats recorded launches.");
}
