"""Work of each kernel, the floor that it sets on a GPU, and measured times: writes docs/roofline.md
and its CSV file.

python -m benchmarks.kernels.roofline [--bandwidth 4.8e12] [--flops 989e12]      defaults: H200
(HBM3e; bfloat16, dense)

A floor is the larger of bytes / bandwidth and operations / rate. Measured times come from
benchmarks/results/; missing ones are marked.
"""

import argparse
import csv
import io
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.shapes import GPU_SHAPES, num_keep
from benchmarks.utils.results import DOCS, RESULTS, Row, load
from cropr_kernels.utils.io import write_text

PAGE = DOCS / "roofline.md"
INTRO = """# Roofline

For each kernel: the bytes it must move (every input read once, every output written once, bfloat16
tokens, int64 positions, float32 scores), the operations it must do, and the floor that these set on
an H200 ({bandwidth:.1f} TB/s, {flops:.0f} bfloat16 TFLOP/s). Times in microseconds, with cold
caches; -: not measured. Written by `python -m benchmarks.kernels.roofline`. Some shapes; all:
[roofline.csv](../benchmarks/results/roofline.csv).

"""
OUTRO = """
## Costs beyond the floors

- **prune** reads x twice, for the scores and for the copy, as no row can move before the last score
  of its image is known; in the L2 cache the second read is not from memory. Two launches, three
  above 1,024 tokens.
- **add_select_ + gather_norm** against **add_norm_**: one more read of the kept rows, and one
  selection; rows stay in place. Beyond the L2 cache that read is {marginal:.2f} of a copy of x at
  256x197x1024, above the goal of 0.15: below it rows would stay on chip until the selection is
  known (a thread block cluster), which needs a GPU to test. Off until a GPU measures them:
  `CACHE_BYTES` in pruning/engine.py runs as many images at a time as fit, so that pruning adds
  {cached:+.2f} of a copy; `RECENT_FIRST` in ops/triton/utils.py begins the second read with the
  last image.
- **select** is bound by latency: one program an image, 16 rounds of counting, two prefix sums. In
  prune and add_select_ the last program of an image selects, without a launch, up to 1,024 tokens:
  more keys would take registers.
- **merging over pruning** is two more launches: one compares candidates with targets and reads
  every active row again ({again:.0f} us at 256x197x1024 from memory), one writes the rows that
  others merge into. The goal of 2 us over pruning holds only in the cache. Attention keys would
  read a sixteenth; they agree less with the unpruned model.
- **proportional attention** with one more dimension pads q, k and v by 8 columns before
  FlashAttention. If one plain matrix projects them it is padded instead: an eighth more operations
  at 64 channels a head, in place of {copies:.0f} us of copies at 256x197x1024. Else (qk-norm,
  rotary positions, small batches) they are copied.
- **attend, M = 1** reads x once in each direction; fewer than 256 images are split into parts of at
  least 64 tokens.
- **attend, M > 1** writes logits to a scratch buffer of 64 MB (two in backward) and reads them
  back: three passes over (M, N), of which nothing is kept for backward.
"""
HEAD = (
    "kernel",
    "shape",
    "MB",
    "GFLOP",
    "floor, us",
    "bound by",
    "measured, us",
    "floor / measured",
)
COLUMNS = (0, 1, 2, 4, 6)  # on the page; the CSV file holds all
SHOWN = ("256x197x1024", "256x197", "256x1x197x1024", "16x1024x1024x1024")


@dataclass
class Work:
    kernel: str
    shape: str
    bytes: float
    flops: float
    measured: float | None = None  # us


def result(name: str) -> list[Row]:
    loaded = load(name)
    return [] if loaded is None else loaded[1]


def find(rows: list[Row], key: str, **cell: Any) -> float | None:
    """Return the measured time of a cell; the cold one if there are two."""
    for row in rows:
        if (
            key in row
            and row.get("L2", "cold") == "cold"
            and all(row.get(k) == v for k, v in cell.items())
        ):
            return float(row[key])
    return None


def stream_works(shape: tuple[int, int, int], ops: list[Row], kernels: list[Row]) -> list[Work]:
    """Prune, and the kernels of the residual stream, at one shape."""
    b, n, d = shape
    k = num_keep(n)
    x = 2.0 * b * n * d
    kept = 2.0 * b * k * d
    text = "x".join(map(str, shape))

    def stream(kernel: str, moved: float, flops: float) -> Work:
        cell = {"kernel": "stream", "shape": list(shape), "dtype": "bfloat16"}
        return Work(kernel, text, moved, flops, find(kernels, f"{kernel}, us", **cell))

    measured = find(ops, "prune, us", shape=list(shape), dtype="bfloat16")
    return [
        Work("prune", text, 3 * x + b * n * 8, 2.0 * b * n * d, measured),
        stream("restore", 2 * x + b * n * 8, 0),
        stream("add_norm_", 4 * x, 8.0 * b * n * d),
        stream(
            "add_select_ + gather_norm", 3 * x + 2 * kept + b * (8 * n + 16 * k), 10.0 * b * n * d
        ),
        stream("merging over pruning", x + 3 * (x - kept) + b * n * 28, 3.0 * b * k * (n - k) * d),
    ]


def works() -> list[Work]:
    """List all kernels at the shapes of the GPU suite."""
    ops = result("gpu_ops")
    kernels = result("gpu_kernels")
    entries: list[Work] = []
    for shape in GPU_SHAPES:
        entries += stream_works(shape, ops, kernels)
    for b, n in ((256, 197), (64, 1025), (8, 9216), (1, 197)):
        measured = find(kernels, "select, us", kernel="select", shape=[b, n])
        entries.append(Work("select", f"{b}x{n}", b * n * 12, 0, measured))
    for b, m, n, d in ((256, 1, 197, 1024), (64, 1, 577, 1024), (16, 1024, 1024, 1024)):
        x = 2.0 * b * n * d
        out = 2.0 * b * m * d
        measured = find(kernels, "attend, us", kernel="attend", shape=[b, m, n, d])
        # forward 2 products, backward 3 for the queries and the two that recompute the logits and
        # slopes
        flops = 10.0 * b * m * n * d
        entries.append(
            Work("attend, forward + backward", f"{b}x{m}x{n}x{d}", 2 * x + 2 * out, flops, measured)
        )
    return entries


def table_row(work: Work, bandwidth: float, flops: float) -> tuple[str, ...]:
    """Cells of the table: the floor of a kernel, its bound, and its measured time."""
    memory_us = work.bytes / bandwidth * 1e6
    arithmetic_us = work.flops / flops * 1e6
    floor = max(memory_us, arithmetic_us)
    bound = "memory" if memory_us >= arithmetic_us else "arithmetic"
    measured = ("", "")
    if work.measured is not None:
        measured = (f"{work.measured}", f"{floor / work.measured:.2f}")
    cells = (
        work.kernel,
        work.shape,
        f"{work.bytes / 1e6:.1f}",
        f"{work.flops / 1e9:.1f}",
        f"{floor:.2f}",
        bound,
    )
    return (*cells, *measured)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes/s")
    parser.add_argument("--flops", type=float, default=989e12, help="operations/s")
    options = parser.parse_args()
    rows = [table_row(work, options.bandwidth, options.flops) for work in works()]
    shown = [HEAD, *(row for row in rows if row[1] in SHOWN)]
    lines = ["| " + " | ".join(row[column] or "-" for column in COLUMNS) + " |" for row in shown]
    lines.insert(1, "|" + "---|" * len(COLUMNS))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((HEAD, *rows))
    write_text(RESULTS / "roofline.csv", text.getvalue())
    intro = INTRO.format(bandwidth=options.bandwidth / 1e12, flops=options.flops / 1e12)
    moved = {work.kernel: work.bytes for work in works() if work.shape == "256x197x1024"}
    marginal = moved["add_select_ + gather_norm"] - moved["add_norm_"]
    copy = 4.0 * 256 * 197 * 1024
    kept = 2.0 * 256 * num_keep(197) * 1024
    outro = OUTRO.format(
        marginal=marginal / copy,
        cached=(marginal - kept) / copy,
        again=moved["merging over pruning"] / options.bandwidth * 1e6,
        copies=3 * (1 + 72 / 64) * copy / 2 / options.bandwidth * 1e6,
    )
    write_text(PAGE, intro + "\n".join(lines) + "\n" + outro)
    print(PAGE)


if __name__ == "__main__":
    main()
