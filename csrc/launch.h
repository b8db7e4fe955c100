// CUDA: what an op launched for arguments like these, it launches again without Python.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cropr {

// An argument of a kernel: a number, or an address in an argument of the op or in what the op allocates.
struct Parameter {
  enum Kind { kNumber, kArgument, kAllocation } kind;
  int64_t index;  // of the argument or the allocation
  int64_t value;  // the bits of the number, or the distance in bytes
};

struct Allocation {
  int32_t dtype;  // as libtorch numbers them
  std::vector<int64_t> sizes;
  size_t zero_bytes;  // that a memset writes before the launches
};

struct Launch {
  uint64_t function;  // CUfunction
  unsigned grid, threads, shared;
  std::vector<Parameter> parameters;
};

struct Plan {
  std::vector<Allocation> allocations;
  std::vector<Launch> launches;
  std::vector<int64_t> outputs;  // which allocations the op returns
};

int32_t dtype_named(const std::string& name);

// Whether the last call of this thread was answered by a plan.
bool replayed();

// Keeps a plan for the arguments of the last call of this thread, which was not.
void keep_plan(Plan plan);
void forget_plans();

// The driver that launches: libcuda.so.1.
void load_driver(const std::string& path);

}  // namespace cropr
