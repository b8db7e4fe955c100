// Defines the ops in a process that has no Python: part of libcropr_ops alone, as Python defines
// them itself.
#include "library.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cropr, library) {
  for (const cropr::Op& op : cropr::kOps) library.def(op.schema);
}
