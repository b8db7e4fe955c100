// The table of ops: schemas, and the dtypes, shapes and ranges of their arguments. Python defines
// the ops and checks their arguments from this table (`_C.ops`), C++ programs define them by
// loading libcropr_ops, and the CPU kernels check their arguments against it (checks.h).
#pragma once

#include <stdexcept>
#include <string_view>

namespace cropr {

enum class Types { kFloat, kFloat32, kInt64, kBool, kPriority, kOfFirst };

// Text of Types in error messages; Python parses the dtypes from it.
constexpr const char* kTypeNames[] = {
    "float32, float64, bfloat16 or float16", "float32", "int64", "bool", "int8 or bool",
    "the dtype of the first tensor"};

enum class Layout { kAny, kContiguous, kDenseRows };

// A tensor. Each letter of its shape, B to T, is one size throughout an op; 2C is twice C, and '|'
// separates alternatives. If an optional tensor is absent, letters that only it has equal N.
struct Input {
  const char* name = nullptr;
  Types types = Types::kFloat;
  const char* shape = nullptr;
  Layout layout = Layout::kAny;
};

// A number in [low, high]; a bound is a sum of letters, 0, or the name of the previous range.
struct Range {
  const char *name = nullptr, *low = nullptr, *high = nullptr;
};

struct Op {
  const char* schema;
  Input inputs[9];
  Range ranges[2] = {};
};

constexpr Input kX{"x", Types::kFloat, "BND"};
constexpr Input kInPlace{"x", Types::kFloat, "BND", Layout::kContiguous};
constexpr Input kQuery{"query", Types::kFloat, "D|MD"};
constexpr Input kQueries{"queries", Types::kFloat, "MD"};
constexpr Input kIdx{"idx", Types::kInt64, "BK"};
constexpr Input kUpdate{"update", Types::kFloat, "BKD"};
constexpr Input kGamma{"gamma", Types::kFloat, "D"}, kWeight{"weight", Types::kFloat, "D"};
constexpr Input kBias{"bias", Types::kFloat, "D"};
constexpr Input kTargets{"target_idx", Types::kInt64, "BT"},
    kCandidates{"candidate_idx", Types::kInt64, "BC"};
constexpr Input kSizes{"sizes", Types::kFloat32, "BN"},
    kPriorities{"priority", Types::kPriority, "BN"};
constexpr Input kCostScale{"cost_scale", Types::kFloat32, "BN"};
constexpr Input kKept{"kept_idx", Types::kInt64, "BK"}, kPruned{"pruned_idx", Types::kInt64, "BR"};
constexpr Input kChangedSizes{"sizes", Types::kFloat32, "BN", Layout::kContiguous},
    kChangedCostScale{"cost_scale", Types::kFloat32, "BN", Layout::kContiguous};
constexpr Input kRows{"rows", Types::kInt64, "T"}, kOrder{"order", Types::kInt64, "T"},
    kStarts{"starts", Types::kInt64, "S"};  // S = B + 1
constexpr Input kParent{"parent", Types::kInt64, "BN", Layout::kContiguous};

constexpr Op kOps[] = {
    {"scores(Tensor x, Tensor query) -> Tensor", {kX, kQuery}},
    {"select(Tensor scores, SymInt num_keep, SymInt num_prefix=0, Tensor? priority=None)"
     " -> (Tensor kept_idx, Tensor pruned_idx)",
     {{"scores", Types::kFloat, "BN"}, kPriorities},
     {{"num_prefix", "0", "N"}, {"num_keep", "num_prefix", "N"}}},
    {"prune(Tensor x, Tensor query, SymInt num_keep, SymInt num_prefix=0, Tensor? priority=None)"
     " -> (Tensor kept, Tensor kept_idx, Tensor pruned, Tensor pruned_idx)",
     {kX, kQuery, kPriorities},
     {{"num_prefix", "0", "N"}, {"num_keep", "num_prefix", "N"}}},
    {"split(Tensor x, Tensor scores, SymInt num_keep, SymInt num_prefix=0, Tensor? priority=None)"
     " -> (Tensor kept, Tensor kept_idx, Tensor pruned, Tensor pruned_idx)",
     {kX, {"scores", Types::kFloat32, "BN"}, kPriorities},
     {{"num_prefix", "0", "N"}, {"num_keep", "num_prefix", "N"}}},
    {"gather(Tensor x, Tensor idx) -> Tensor", {kX, kIdx}},
    {"restore(Tensor kept, Tensor kept_idx, Tensor pruned, Tensor pruned_idx) -> Tensor",
     {{"kept", Types::kFloat, "BKD"}, kKept, {"pruned", Types::kOfFirst, "BRD"}, kPruned}},
    {"attend(Tensor x, Tensor queries, float scale) -> Tensor", {kX, kQueries}},
    {"attend_scores(Tensor x, Tensor queries, float scale) -> (Tensor out, Tensor scores)",
     {kX, kQueries}},
    {"attend_backward(Tensor grad_out, Tensor x, Tensor queries, float scale) -> Tensor",
     {kX, kQueries, {"grad_out", Types::kFloat, "BMD"}}},
    {"merge(Tensor x, Tensor target_idx, Tensor candidate_idx, Tensor sizes, SymInt num_keep,"
     " SymInt num_prefix=0, Tensor? cost_scale=None)"
     " -> (Tensor kept, Tensor kept_idx, Tensor pruned_idx, Tensor kept_sizes, Tensor dest)",
     {kX, kTargets, kCandidates, kSizes, kCostScale},
     {{"num_prefix", "0", "T"}, {"num_keep", "T", "T + C"}}},
    {"parent_offsets(Tensor x, Tensor kept_idx, Tensor pruned_idx, SymInt num_prefix=0)"
     " -> (Tensor offset, Tensor parent_idx)",
     {kX, kKept, kPruned},
     {{"num_prefix", "0", "K"}}},
    {"add_parents(Tensor x, Tensor parent) -> Tensor", {kX, {"parent", Types::kInt64, "BN"}}},
    // Ops of the engine: x is the residual buffer and changes in place, idx holds the active
    // positions (None: all).
    {"gather_norm(Tensor x, Tensor? idx, Tensor? weight, Tensor? bias, float eps, bool rms=False) "
     "-> Tensor",
     {kX, kIdx, kWeight, kBias}},
    {"add_(Tensor(a!) x, Tensor? idx, Tensor update, Tensor? gamma) -> ()",
     {kInPlace, kIdx, kUpdate, kGamma}},
    {"add_norm_(Tensor(a!) x, Tensor? idx, Tensor update, Tensor? gamma, Tensor? weight, Tensor? "
     "bias,"
     " float eps, bool rms=False) -> Tensor",
     {kInPlace, kIdx, kUpdate, kGamma, kWeight, kBias}},
    {"add_select_(Tensor(a!) x, Tensor? idx, Tensor update, Tensor? gamma, Tensor query, SymInt "
     "num_keep,"
     " SymInt num_prefix=0, Tensor? sizes=None, float size_weight=0.0, Tensor? priority=None, "
     "Tensor(b!)? "
     "cost_scale=None,"
     " float cost_weight=0.0)"
     " -> (Tensor kept_idx, Tensor pruned_idx)",
     {kInPlace, kIdx, kUpdate, kGamma, kQuery, kSizes, kPriorities, kChangedCostScale},
     {{"num_prefix", "0", "K"}, {"num_keep", "num_prefix", "K"}}},
    {"merge_(Tensor(a!) x, Tensor target_idx, Tensor candidate_idx, Tensor(b!) sizes, Tensor(c!) "
     "parent,"
     " SymInt num_keep, SymInt num_prefix=0, bool offsets=False, Tensor? cost_scale=None)"
     " -> (Tensor kept_idx, Tensor pruned_idx, Tensor kept_sizes)",
     {kInPlace, kTargets, kCandidates, kChangedSizes, kParent, kCostScale},
     {{"num_prefix", "0", "T"}, {"num_keep", "T", "T + C"}}},
    {"parent_offsets_(Tensor(a!) x, Tensor kept_idx, Tensor pruned_idx, Tensor(b!) parent, SymInt "
     "num_prefix=0) -> ()",
     {kInPlace, kKept, kPruned, kParent},
     {{"num_prefix", "0", "K"}}},
    {"rotate_(Tensor(a!) x, Tensor table, Tensor? idx, SymInt num_prefix=0, bool half=False) -> ()",
     {{"x", Types::kFloat, "BKHC", Layout::kDenseRows}, {"table", Types::kFloat, "P2C"}, kIdx},
     {{"num_prefix", "0", "K"}}},
    // The same where each image has as many active tokens as it needs: rows of x.view(B * N, D),
    // image after image, from starts (B + 1) on.
    {"ragged_add_select_(Tensor(a!) x, Tensor rows, Tensor starts, Tensor update, Tensor? gamma,"
     " Tensor query, SymInt num_candidates, SymInt num_prefix=0, Tensor? sizes=None,"
     " float size_weight=0.0, Tensor? priority=None, Tensor(b!)? cost_scale=None,"
     " float cost_weight=0.0) -> Tensor",
     {kInPlace,
      kRows,
      kStarts,
      {"update", Types::kFloat, "TD"},
      kGamma,
      kQuery,
      kSizes,
      kPriorities,
      kChangedCostScale},
     {{"num_prefix", "0", "N"}, {"num_candidates", "0", "N"}}},
    {"ragged_nearest(Tensor x, Tensor order, Tensor starts, SymInt num_candidates,"
     " SymInt num_prefix=0, Tensor? cost_scale=None) -> (Tensor costs, Tensor nearest)",
     {kX, kOrder, kStarts, kCostScale},
     {{"num_prefix", "0", "N"}, {"num_candidates", "0", "N"}}},
    {"ragged_merge_(Tensor(a!) x, Tensor order, Tensor starts, Tensor prune, Tensor nearest,"
     " Tensor(b!) sizes, Tensor(c!) parent, SymInt num_kept, SymInt num_prefix=0,"
     " bool offsets=False) -> (Tensor rows, Tensor starts, Tensor sizes)",
     {kInPlace,
      kOrder,
      kStarts,
      {"prune", Types::kBool, "BC"},
      {"nearest", Types::kInt64, "BC"},
      kChangedSizes,
      kParent},
     {{"num_prefix", "0", "N"}, {"num_kept", "0", "T"}}},
    {"attend_segments(Tensor q, Tensor k, Tensor v, Tensor starts, SymInt longest,"
     " Tensor? log_sizes=None, float? scale=None) -> Tensor",
     {{"q", Types::kFloat, "THC"},
      {"k", Types::kOfFirst, "THC"},
      {"v", Types::kOfFirst, "THC"},
      {"starts", Types::kInt64, "S"},
      {"log_sizes", Types::kFloat32, "T"}},
     {{"longest", "0", "T"}}},
};

constexpr std::string_view name_of(const Op& op) {
  const std::string_view schema = op.schema;
  return schema.substr(0, schema.find('('));
}

// Evaluated at compile time, so that an unknown name does not compile.
consteval const Op& op_named(std::string_view name) {
  for (const Op& op : kOps)
    if (name_of(op) == name) return op;
  throw std::invalid_argument("unknown op");
}

}  // namespace cropr
