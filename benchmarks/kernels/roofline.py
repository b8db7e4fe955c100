"""Work of each kernel, the floor that it sets on a GPU, and measured times: writes docs/roofline.md and its CSV file.

python -m benchmarks.kernels.roofline [--bandwidth 4.8e12] [--flops 989e12]      defaults: H200 (HBM3e; bfloat16, dense)

A floor is the larger of bytes / bandwidth and operations / rate. Measured times come from benchmarks/results/; where
there is none the page says so.
"""

import argparse
import csv
import io
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.shapes import GPU_SHAPES, num_keep
from benchmarks.utils.results import DOCS, RESULTS, load
from cropr_kernels.utils.io import write_text

PAGE = DOCS / "roofline.md"
INTRO = """# Roofline

For each kernel: the bytes it must move (every input read once, every output written once, bfloat16 tokens, int64
positions, float32 scores), the operations it must do, and the floor that these set on an H200 ({bandwidth:.1f} TB/s,
{flops:.0f} bfloat16 TFLOP/s). Times in microseconds, with cold caches; -: not measured. Written by
`python -m benchmarks.kernels.roofline`. Some shapes; all: [roofline.csv](../benchmarks/results/roofline.csv).

"""
OUTRO = """
## Costs beyond the floors

- **prune** reads x twice, for the scores and for the copy, as no row can move before the last score of its image is
  known; in the L2 cache the second read is not from memory. Two launches, three above 1,024 tokens.
- **add_select_ + gather_norm** against **add_norm_**: one more read of the kept rows, and one selection; rows stay in
  place. Beyond the L2 cache that read is {marginal:.2f} of a copy of x at 256x197x1024, above the goal of 0.15: below
  it rows would stay on chip until the selection is known (a thread block cluster), which needs a GPU to test. Off until
  a GPU measures them: `CACHE_BYTES` in pruning/engine.py runs as many images at a time as fit, so that pruning adds
  {cached:+.2f} of a copy; `RECENT_FIRST` in ops/triton/utils.py begins the second read with the last image.
- **select** is bound by latency: one program an image, 16 rounds of counting, two prefix sums. In prune and add_select_
  the last program of an image selects, without a launch, up to 1,024 tokens: more keys would take registers.
- **merging over pruning** is two more launches: one compares candidates with targets and reads every active row again
  ({again:.0f} us at 256x197x1024 from memory), one writes the rows that others merge into. The goal of 2 us over
  pruning holds only in the cache. Attention keys would read a sixteenth; they agree less with the unpruned model.
- **proportional attention** with one more dimension pads q, k and v by 8 columns before FlashAttention. If one plain
  matrix projects them it is padded instead: an eighth more operations at 64 channels a head, in place of
  {copies:.0f} us of copies at 256x197x1024. Else (qk-norm, rotary positions, small batches) they are copied.
- **attend, M = 1** reads x once in each direction; fewer than 256 images are split into parts of at least 64 tokens.
- **attend, M > 1** writes logits to a scratch buffer of 64 MB (two in backward) and reads them back: three passes over
  (M, N), of which nothing is kept for backward.
"""
SHOWN = ("256x197x1024", "256x197", "256x1x197x1024", "16x1024x1024x1024")  # on the page; the CSV file holds all


@dataclass
class Work:
    kernel: str
    shape: str
    bytes: float
    flops: float
    measured: float | None = None  # us


def result(name: str) -> list[dict[str, Any]]:
    found = load(name)
    return [] if found is None else found[1]


def find(rows: list[dict[str, Any]], key: str, **wanted: Any) -> float | None:
    """A measured time, cold where there are both."""
    for row in rows:
        if key in row and row.get("L2", "cold") == "cold" and all(row.get(k) == v for k, v in wanted.items()):
            return float(row[key])
    return None


def works() -> list[Work]:
    """All kernels at the shapes the GPU suite measures."""
    ops, kernels = result("gpu_ops"), result("gpu_kernels")
    found: list[Work] = []
    for shape in GPU_SHAPES:
        b, n, d = shape
        k, text, x = num_keep(n), "x".join(map(str, shape)), 2.0 * b * n * d
        kept = 2.0 * b * k * d
        wanted = {"shape": list(shape), "dtype": "bfloat16"}
        found += [
            Work("prune", text, 3 * x + b * n * 8, 2.0 * b * n * d, find(ops, "prune, us", **wanted)),
            Work("restore", text, 2 * x + b * n * 8, 0, find(kernels, "restore, us", kernel="stream", **wanted)),
            Work("add_norm_", text, 4 * x, 8.0 * b * n * d, find(kernels, "add_norm_, us", kernel="stream", **wanted)),
            Work(
                "add_select_ + gather_norm",
                text,
                3 * x + 2 * kept + b * (8 * n + 16 * k),
                10.0 * b * n * d,
                find(kernels, "add_select_ + gather_norm, us", kernel="stream", **wanted),
            ),
            Work(
                "merging over pruning",
                text,
                x + 3 * (x - kept) + b * n * 28,
                3.0 * b * k * (n - k) * d,
                find(kernels, "merging over pruning, us", kernel="stream", **wanted),
            ),
        ]
    for b, n in ((256, 197), (64, 1025), (8, 9216), (1, 197)):
        measured = find(kernels, "select, us", kernel="select", shape=[b, n])
        found.append(Work("select", f"{b}x{n}", b * n * 12, 0, measured))
    for b, m, n, d in ((256, 1, 197, 1024), (64, 1, 577, 1024), (16, 1024, 1024, 1024)):
        x, out = 2.0 * b * n * d, 2.0 * b * m * d
        measured = find(kernels, "attend, us", kernel="attend", shape=[b, m, n, d])
        # forward 2 products, backward 3 for the queries and the two that recompute the logits and slopes
        work = Work("attend, forward + backward", f"{b}x{m}x{n}x{d}", 2 * x + 2 * out, 10.0 * b * m * n * d, measured)
        found.append(work)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes/s")
    parser.add_argument("--flops", type=float, default=989e12, help="operations/s")
    options = parser.parse_args()
    head = ("kernel", "shape", "MB", "GFLOP", "floor, us", "bound by", "measured, us", "floor / measured")
    rows = []
    for work in works():
        by_bytes, by_flops = work.bytes / options.bandwidth * 1e6, work.flops / options.flops * 1e6
        floor = max(by_bytes, by_flops)
        bound = "memory" if by_bytes >= by_flops else "arithmetic"
        measured = ("", "") if work.measured is None else (f"{work.measured}", f"{floor / work.measured:.2f}")
        cells = (work.kernel, work.shape, f"{work.bytes / 1e6:.1f}", f"{work.flops / 1e9:.1f}", f"{floor:.2f}", bound)
        rows.append((*cells, *measured))
    columns = (0, 1, 2, 4, 6)
    shown = [head, *(row for row in rows if row[1] in SHOWN)]
    lines = ["| " + " | ".join(row[column] or "-" for column in columns) + " |" for row in shown]
    lines.insert(1, "|" + "---|" * len(columns))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((head, *rows))
    write_text(RESULTS / "roofline.csv", text.getvalue())
    intro = INTRO.format(bandwidth=options.bandwidth / 1e12, flops=options.flops / 1e12)
    plain, pruning, merging = (
        next(work.bytes for work in works() if work.kernel == kernel and work.shape == "256x197x1024")
        for kernel in ("add_norm_", "add_select_ + gather_norm", "merging over pruning")
    )
    copy, kept = 4.0 * 256 * 197 * 1024, 2.0 * 256 * num_keep(197) * 1024
    outro = OUTRO.format(
        marginal=(pruning - plain) / copy,
        cached=(pruning - plain - kept) / copy,
        again=merging / options.bandwidth * 1e6,
        copies=3 * (1 + 72 / 64) * copy / 2 / options.bandwidth * 1e6,
    )
    write_text(PAGE, intro + "\n".join(lines) + "\n" + outro)
    print(PAGE)


if __name__ == "__main__":
    main()
