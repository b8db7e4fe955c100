// Images with different numbers of active tokens: rows of x.view(B * N, D), image after image.
#pragma once

#include <algorithm>

#include "checks.h"
#include "tensor.h"

namespace cropr {

// Ascending targets and candidates of one image: positions in it, or with first_row = b * N rows of
// x.view(B * N, D).
struct ImageLists {
  const int64_t *targets, *candidates;
  int64_t num_targets, num_candidates, first_row;

  int64_t target(int64_t i) const {
    return targets[i] - first_row;
  }
  int64_t candidate(int64_t i) const {
    return candidates[i] - first_row;
  }
};

// rows (T,) and where each image begins in them; or an order of them, in which the targets of an
// image precede its candidates.
struct RaggedRows {
  Tensor rows, starts;  // contiguous
  const int64_t *row_data, *start_data;
  int64_t batch, n, num_rows, num_candidates, num_prefix;

  RaggedRows(
      const Op& op, const Dims& dims, const Tensor& row_list, const Tensor& image_starts,
      int64_t candidates, int64_t prefix)
      : rows(torch::stable::contiguous(row_list)),
        starts(torch::stable::contiguous(image_starts)),
        row_data(data<int64_t>(rows)),
        start_data(data<int64_t>(starts)),
        batch(dims['B']),
        n(dims['N']),
        num_rows(dims['T']),
        num_candidates(candidates),
        num_prefix(prefix) {
    if (dims['S'] != batch + 1)
      fail(
          name_of(op), ": starts must have shape (B + 1 = ", batch + 1, ",), got ",
          shape_of(starts));
    if (start_data[0] != 0) fail(name_of(op), ": starts must begin with 0, got ", start_data[0]);
    for (int64_t b = 0; b < batch; ++b)
      if (count(b) < num_prefix)
        fail(
            name_of(op), ": starts must leave each image at least num_prefix = ", num_prefix,
            " rows, got ", count(b), " for image ", b);
    if (start_data[batch] != num_rows)
      fail(name_of(op), ": starts must end with T = ", num_rows, ", got ", start_data[batch]);
  }

  int64_t count(int64_t b) const {
    return start_data[b + 1] - start_data[b];
  }
  int64_t candidates_of(int64_t b) const {
    return std::min(num_candidates, (count(b) - num_prefix) / 2);
  }
  ImageLists image(int64_t b) const {
    const int64_t candidates = candidates_of(b), targets = count(b) - candidates;
    const int64_t* first = row_data + start_data[b];
    return {first, first + targets, targets, candidates, b * n};
  }

  // Raises an error unless the rows of each image lie in it and ascend.
  void check_ascending(const Op& op, const char* name) const {
    for (int64_t b = 0; b < batch; ++b) check_list(op, name, row_data + start_data[b], count(b), b);
  }

  // Raises an error unless the targets of each image lie in it and ascend, so do its candidates,
  // and no token is both.
  void check_order(const Op& op) const {
    for (int64_t b = 0; b < batch; ++b) {
      const ImageLists lists = image(b);
      check_list(op, "order", lists.targets, lists.num_targets, b);
      check_list(op, "order", lists.candidates, lists.num_candidates, b);
      for (int64_t i = 0, c = 0; i < lists.num_targets && c < lists.num_candidates;) {
        if (lists.targets[i] == lists.candidates[c])
          fail(
              name_of(op), ": order must hold each row once, got ", lists.targets[i],
              " twice in image ", b);
        ++(lists.targets[i] < lists.candidates[c] ? i : c);
      }
    }
  }

 private:
  void check_list(
      const Op& op, const char* name, const int64_t* list, int64_t length, int64_t b) const {
    for (int64_t i = 0; i < length; ++i) {
      if (list[i] < b * n || list[i] >= (b + 1) * n)
        fail(
            name_of(op), ": ", name, " must hold rows in [", b * n, ", ", (b + 1) * n,
            ") for image ", b, ", got ", list[i]);
      if (i > 0 && list[i - 1] >= list[i])
        fail(
            name_of(op), ": ", name, " must be ascending, got ", list[i - 1], " before ", list[i],
            " in image ", b);
    }
  }
};

}  // namespace cropr
