// Defines the ops in a process that has no Python: part of libcropr_ops alone, as Python defines them itself.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(cropr, library) {
  for (const char* schema : cropr::kSchemas) library.def(schema);
}
