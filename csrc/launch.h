// CUDA: repeats without Python what an op launched before for similar arguments.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cropr {

// An argument of a kernel: a number, or an address in an argument or an allocation of the op.
struct Parameter {
  enum Kind { kNumber, kArgument, kAllocation } kind;
  int64_t index;  // of the argument or the allocation
  int64_t value;  // the bits of the number, or the distance in bytes
};

struct Allocation {
  int32_t dtype;  // as libtorch numbers them
  std::vector<int64_t> sizes;
  size_t zero_bytes;  // set to zero before the launches
};

struct Launch {
  uint64_t function;  // CUfunction
  unsigned grid, threads, shared;
  std::vector<Parameter> parameters;
};

// What an op allocated, launched and returned, for arguments of the same dtypes, sizes, strides and
// alignments.
struct RecordedLaunches {
  std::vector<Allocation> allocations;
  std::vector<Launch> launches;
  std::vector<int64_t> outputs;  // indices of the allocations that the op returns
};

int32_t dtype_named(const std::string& name);

// True if the last call of this thread was answered by recorded launches.
bool replayed();

// Keeps launches for the arguments of the last call of this thread, if it was not replayed.
void keep_launches(RecordedLaunches recorded);
void forget_launches();

// The driver that launches: libcuda.so.1.
void load_driver(const std::string& path);

}  // namespace cropr
