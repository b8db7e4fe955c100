// The ops, once: what they are called with and what they accept. Python defines and checks them from this table
// (`_C.ops`), a C++ program has them by loading libcropr_ops, the CPU kernels check by it (checks.h).
#pragma once

#include <stdexcept>
#include <string_view>

namespace cropr {

enum class Types { kFloat, kFloat32, kInt64, kPriority, kOfFirst };

// What errors say of them; Python reads from this which dtypes there are.
constexpr const char* kTypeNames[] = {
    "float32, float64, bfloat16 or float16", "float32", "int64", "int8 or bool", "the dtype of the first tensor"};

enum class Layout { kAny, kContiguous, kDenseRows };

// A tensor. A letter of its shape, B to S, is a size: where it stands again it is the same again; 2C is twice C. '|'
// parts alternatives. Where an optional tensor is left out, letters that only it has are N.
struct Input {
  const char* name = nullptr;
  Types types = Types::kFloat;
  const char* shape = nullptr;
  Layout layout = Layout::kAny;
};

// A number in [low, high]: sums of letters, 0, or the name of the range before.
struct Range {
  const char *name = nullptr, *low = nullptr, *high = nullptr;
};

struct Op {
  const char* schema;
  Input inputs[8];
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
constexpr Input kSafe{"safe_idx", Types::kInt64, "BS"}, kCandidates{"candidate_idx", Types::kInt64, "BC"};
constexpr Input kSizes{"sizes", Types::kFloat32, "BN"}, kPriorities{"priority", Types::kPriority, "BN"};
constexpr Input kCosts{"costs", Types::kFloat32, "BN"};
constexpr Input kKept{"kept_idx", Types::kInt64, "BK"}, kPruned{"pruned_idx", Types::kInt64, "BR"};
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
    {"attend_scores(Tensor x, Tensor queries, float scale) -> (Tensor out, Tensor scores)", {kX, kQueries}},
    {"attend_backward(Tensor grad_out, Tensor x, Tensor queries, float scale) -> Tensor",
     {kX, kQueries, {"grad_out", Types::kFloat, "BMD"}}},
    {"merge(Tensor x, Tensor safe_idx, Tensor candidate_idx, Tensor sizes, SymInt num_keep,"
     " SymInt num_prefix=0, Tensor? costs=None)"
     " -> (Tensor kept, Tensor kept_idx, Tensor pruned_idx, Tensor kept_sizes, Tensor dest)",
     {kX, kSafe, kCandidates, kSizes, kCosts},
     {{"num_prefix", "0", "S"}, {"num_keep", "S", "S + C"}}},
    {"host_offsets(Tensor x, Tensor kept_idx, Tensor pruned_idx, SymInt num_prefix=0)"
     " -> (Tensor offset, Tensor host_idx)",
     {kX, kKept, kPruned},
     {{"num_prefix", "0", "K"}}},
    {"add_hosts(Tensor x, Tensor parent) -> Tensor", {kX, {"parent", Types::kInt64, "BN"}}},
    // The engine's: x is the residual buffer and changes in place, idx names the active tokens (None: all).
    {"gather_norm(Tensor x, Tensor? idx, Tensor? weight, Tensor? bias, float eps) -> Tensor",
     {kX, kIdx, kWeight, kBias}},
    {"add_(Tensor(a!) x, Tensor? idx, Tensor update, Tensor? gamma) -> ()", {kInPlace, kIdx, kUpdate, kGamma}},
    {"add_norm_(Tensor(a!) x, Tensor? idx, Tensor update, Tensor? gamma, Tensor? weight, Tensor? bias,"
     " float eps) -> Tensor",
     {kInPlace, kIdx, kUpdate, kGamma, kWeight, kBias}},
    {"add_select_(Tensor(a!) x, Tensor? idx, Tensor update, Tensor? gamma, Tensor query, SymInt num_keep,"
     " SymInt num_prefix=0, Tensor? sizes=None, float size_weight=0.0, Tensor? priority=None, Tensor(b!)? costs=None,"
     " float cost_weight=0.0)"
     " -> (Tensor kept_idx, Tensor pruned_idx)",
     {kInPlace,
      kIdx,
      kUpdate,
      kGamma,
      kQuery,
      kSizes,
      kPriorities,
      {"costs", Types::kFloat32, "BN", Layout::kContiguous}},
     {{"num_prefix", "0", "K"}, {"num_keep", "num_prefix", "K"}}},
    {"merge_(Tensor(a!) x, Tensor safe_idx, Tensor candidate_idx, Tensor(b!) sizes, Tensor(c!) parent,"
     " SymInt num_keep, SymInt num_prefix=0, bool offsets=False, Tensor? costs=None)"
     " -> (Tensor kept_idx, Tensor pruned_idx, Tensor kept_sizes)",
     {kInPlace, kSafe, kCandidates, {"sizes", Types::kFloat32, "BN", Layout::kContiguous}, kParent, kCosts},
     {{"num_prefix", "0", "S"}, {"num_keep", "S", "S + C"}}},
    {"host_offsets_(Tensor(a!) x, Tensor kept_idx, Tensor pruned_idx, Tensor(b!) parent, SymInt num_prefix=0) -> ()",
     {kInPlace, kKept, kPruned, kParent},
     {{"num_prefix", "0", "K"}}},
    {"rotate_(Tensor(a!) x, Tensor table, Tensor? idx, SymInt num_prefix=0, bool half=False) -> ()",
     {{"x", Types::kFloat, "BKHC", Layout::kDenseRows}, {"table", Types::kFloat, "P2C"}, kIdx},
     {{"num_prefix", "0", "K"}}},
};

constexpr std::string_view name_of(const Op& op) {
  const std::string_view schema = op.schema;
  return schema.substr(0, schema.find('('));
}

// Looked up while compiling: a name that is none does not compile.
consteval const Op& op_named(std::string_view name) {
  for (const Op& op : kOps)
    if (name_of(op) == name) return op;
  throw std::invalid_argument("no such op");
}

}  // namespace cropr
