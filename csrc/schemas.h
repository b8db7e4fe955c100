// The schemas of all ops, once: Python defines the ops from these (`_C.schemas`), a C++ program by loading
// libcropr_ops.
#pragma once

namespace cropr {

constexpr const char* kSchemas[] = {
    "scores(Tensor x, Tensor query) -> Tensor",
    "select(Tensor scores, SymInt num_keep, SymInt num_prefix=0, Tensor? priority=None) -> (Tensor kept_idx,"
    " Tensor pruned_idx)",
    "prune(Tensor x, Tensor query, SymInt num_keep, SymInt num_prefix=0, Tensor? priority=None)"
    " -> (Tensor kept, Tensor kept_idx, Tensor pruned, Tensor pruned_idx)",
    "split(Tensor x, Tensor scores, SymInt num_keep, SymInt num_prefix=0, Tensor? priority=None)"
    " -> (Tensor kept, Tensor kept_idx, Tensor pruned, Tensor pruned_idx)",
    "gather(Tensor x, Tensor idx) -> Tensor",
    "restore(Tensor kept, Tensor kept_idx, Tensor pruned, Tensor pruned_idx) -> Tensor",
    "attend(Tensor x, Tensor queries, float scale) -> Tensor",
    "attend_scores(Tensor x, Tensor queries, float scale) -> (Tensor out, Tensor scores)",
    "attend_backward(Tensor grad_out, Tensor x, Tensor queries, float scale) -> Tensor",
    "merge(Tensor x, Tensor safe_idx, Tensor candidate_idx, Tensor sizes, SymInt num_keep,"
    " Tensor? features=None, SymInt num_prefix=0) -> (Tensor kept, Tensor kept_idx, Tensor pruned_idx,"
    " Tensor kept_sizes, Tensor dest)",
    // The residual stream of the engine: x stays in place, idx names the tokens still alive (None: all).
    "gather_norm(Tensor x, Tensor? idx, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    "add_(Tensor(a!) x, Tensor? idx, Tensor update, Tensor? gamma) -> ()",
    "add_norm_(Tensor(a!) x, Tensor? idx, Tensor update, Tensor? gamma, Tensor? weight, Tensor? bias,"
    " float eps) -> Tensor",
    "add_select_(Tensor(a!) x, Tensor? idx, Tensor update, Tensor? gamma, Tensor query,"
    " SymInt num_keep, SymInt num_prefix=0, Tensor? sizes=None, float size_weight=0.0,"
    " Tensor? priority=None) -> (Tensor kept_idx, Tensor pruned_idx)",
    "merge_(Tensor(a!) x, Tensor safe_idx, Tensor candidate_idx, Tensor(b!) sizes, Tensor(c!) parent,"
    " SymInt num_keep, SymInt num_prefix=0) -> (Tensor kept_idx, Tensor pruned_idx, Tensor kept_sizes)",
    "rotate_(Tensor(a!) x, Tensor table, Tensor? idx, SymInt num_prefix=0, bool half=False) -> ()",
};

}  // namespace cropr
