"""Roofline of every kernel: lower bounds and measured times on a GPU. Writes docs/roofline.md.

python -m benchmarks.kernels.roofline [--bandwidth 4.8e12] [--flops 989e12]      defaults: H200 (HBM3e; bfloat16, dense)

A floor is the larger of bytes / bandwidth and operations / rate. Measured times come from
benchmarks/results/; missing ones are marked.
"""

import argparse
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.shapes import GPU_SHAPES, num_keep
from benchmarks.utils.results import DOCS, Row, load
from cropr_kernels.utils.io import write_text

PAGE = DOCS / "roofline.md"
INTRO = """# Roofline

For each kernel: the bytes it must move (every input read once, every output written once, bfloat16 tokens, int64
positions, float32 scores), the operations it must do, and the floor that sets on an H200 ({bandwidth:.1f} TB/s,
{flops:.0f} bfloat16 TFLOP/s). B images, N tokens, K kept of them, D channels, M queries. Times are in microseconds.
Written by `python -m benchmarks.kernels.roofline` from `benchmarks/results/`; measured with cold caches.

"""
OUTRO = """
## What each kernel does beyond its floor, and why

- **prune** reads x twice: once for the scores, once for the copy, because no row can move before the last score of
  its image is known. Where x fits the L2 cache the second read is not from memory. Two launches, three above 1,024
  tokens.
- **add_select_ + gather_norm** against **add_norm_**: pruning costs one more read of the kept rows, for the same
  reason, and one selection. The rows themselves stay where they are. Once x is larger than the L2 cache that read alone
  is {marginal:.2f} of a copy of x at 256x197x1024, above the goal of 0.15: to get below it, the programs of an image
  would have to hold their rows on chip until its selection is known (a thread block cluster, or a wait between
  programs), which needs a GPU to test. Where x fits the cache it is not a read from memory: with
  `CACHE_BYTES` in pruning/engine.py at half of the L2 cache, that many images run through all blocks at a time, the
  read stays on chip, and pruning adds {cached:+.2f} of a copy, since fewer rows are written. It is off until a GPU says
  that the smaller matrix products cost less than that saves. Cheaper, and as untried: with `RECENT_FIRST` in
  ops/triton/utils.py the second read begins with the last image, so that as much as fits the cache is still there.
- **select** is bound by latency, not by bytes: one program an image, 16 rounds of counting, two prefix sums. In prune
  and add_select_ it is the last program of an image that selects, so it needs no launch of its own, up to 1,024 tokens:
  the keys of more would take registers from the programs that stream rows.
- **merging over pruning** is two more launches: one compares candidates with targets, which reads every active row
  once more ({again:.0f} us at 256x197x1024, where x is larger than the L2 cache), one writes the few rows that other
  tokens merge into. The goal of 2 us over pruning can hold only where x is in the cache. Comparing attention keys would
  read a sixteenth of that; it agrees less with the unpruned model (benchmarks.md).
- **proportional attention** with one more dimension pads q, k and v by 8 columns before FlashAttention. Where one plain
  matrix projects them it is padded instead, at every call, as it is smaller than they are: an eighth more operations
  at 64 channels a head, in place of {copies:.0f} us of copies at 256x197x1024. Elsewhere (qk-norm, rotary positions,
  small batches) they are copied.
- **attend, M = 1** reads x once in each direction. Fewer than 256 images are split into parts of at least 64 tokens:
  one image of 577 tokens keeps 10 programs busy.
- **attend, M > 1** writes logits to a scratch buffer of 64 MB (two in backward) and reads them back: three passes over
  (M, N) that a kernel keeping D = 1024 wide rows on chip would not need. Nothing of that shape is kept for backward.
"""


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
        if key in row and row.get("L2", "cold") == "cold" and all(row.get(k) == v for k, v in cell.items()):
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
        stream("add_select_ + gather_norm", 3 * x + 2 * kept + b * (8 * n + 16 * k), 10.0 * b * n * d),
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
        entries.append(Work("attend, forward + backward", f"{b}x{m}x{n}x{d}", 2 * x + 2 * out, flops, measured))
    return entries


def table_row(work: Work, bandwidth: float, flops: float) -> str:
    """A line of the table: the floor of a kernel, its bound, and its measured time."""
    memory_us = work.bytes / bandwidth * 1e6
    arithmetic_us = work.flops / flops * 1e6
    floor = max(memory_us, arithmetic_us)
    bound = "memory" if memory_us >= arithmetic_us else "arithmetic"
    measured = ("not yet measured", "-")
    if work.measured is not None:
        measured = (f"{work.measured}", f"{floor / work.measured:.2f}")
    cells = (work.kernel, work.shape, f"{work.bytes / 1e6:.1f}", f"{work.flops / 1e9:.1f}", f"{floor:.2f}", bound)
    return "| " + " | ".join((*cells, *measured)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes/s")
    parser.add_argument("--flops", type=float, default=989e12, help="operations/s")
    options = parser.parse_args()
    lines = [
        "| kernel | shape | MB | GFLOP | floor, us | bound by | measured, us | floor / measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [table_row(work, options.bandwidth, options.flops) for work in works()]
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
