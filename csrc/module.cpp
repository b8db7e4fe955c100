// The Python module `cropr_kernels._C`: importing it registers the CPU kernels; it reports how it was built.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <iterator>
#include <string>

#include "schemas.h"

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
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return "x86-64-v4";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "x86-64-v3";
#endif
  return "default";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of cropr_kernels; importing this module registers them with the PyTorch dispatcher.";
  pybind11::tuple schemas(std::size(cropr::kSchemas));
  for (std::size_t i = 0; i < std::size(cropr::kSchemas); ++i) schemas[i] = cropr::kSchemas[i];
  m.attr("schemas") = schemas;
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = compiler();
        info["torch_headers"] = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + "." +
                                std::to_string(TORCH_VERSION_PATCH);
        info["torch_abi"] = CROPR_TORCH_ABI;
        info["cpu_instruction_set"] = instruction_set();
        return info;
      },
      "Facts of this build as a dict: compiler, torch_headers, torch_abi, cpu_instruction_set.");
}
