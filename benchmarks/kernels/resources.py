"""Registers, shared memory, stack, blocks per processor and lint of every Triton kernel that models
of known widths launch. Compiled ahead of time: needs no GPU.

python -m benchmarks.kernels.resources [--arch 90] [--dtype bfloat16] [--all]
"""

import argparse
import sys

from benchmarks.kernels.launches import (
    ARCHITECTURES,
    SIDES,
    TYPES,
    WIDTHS,
    compile_launches,
    launches,
)
from benchmarks.kernels.lint import blocks_a_processor, narrow_rows, problems, resources

SHORT = {"widths": [384, 1024], "sides": [24]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--dtype", choices=TYPES, help="default: all")
    parser.add_argument(
        "--all",
        action="store_true",
        help=f"all widths and grids, not {SHORT} only: most of an hour",
    )
    options = parser.parse_args()
    chosen = {"widths": WIDTHS, "sides": SIDES} if options.all else SHORT
    failures = []
    columns = ("dtype", "sm", "warps", "registers", "shared", "stack", "blocks")
    print("".join(f"{column:>10}" for column in columns), " kernel and constants")
    for dtype in [options.dtype] if options.dtype else TYPES:
        recorded = launches(dtype, **chosen)
        for architecture in [options.arch] if options.arch else ARCHITECTURES:
            for launch, compiled in compile_launches(recorded, architecture):
                usage = resources(compiled)
                numbers = (
                    launch.options["num_warps"],
                    usage["REG"],
                    compiled.metadata.shared,
                    usage["STACK"],
                    blocks_a_processor(compiled, usage),
                )
                print(
                    "".join(f"{value:>10}" for value in (dtype, architecture, *numbers)),
                    f" {launch}",
                    flush=True,
                )
                messages = problems(launch, compiled) + narrow_rows(launch, compiled)
                failures += [
                    f"{launch} {dtype} sm_{architecture}: {problem}" for problem in messages
                ]
    sys.exit("\n".join(failures) or 0)


if __name__ == "__main__":
    main()
