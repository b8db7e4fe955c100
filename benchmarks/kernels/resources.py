"""Registers, shared memory and spills of every Triton kernel that models of known widths launch, and what the lint says
of them. Compiled ahead of time: needs no GPU.

python -m benchmarks.kernels.resources [--arch 90] [--dtype bfloat16] [--all]
"""

import argparse
import sys

from .launches import ARCHITECTURES, SIDES, TYPES, WIDTHS, compile_launches, launches
from .lint import narrow_rows, problems, resources

SHORT = {"widths": [384, 1024], "sides": [24]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--dtype", choices=TYPES, help="default: all")
    parser.add_argument("--all", action="store_true", help=f"all widths and grids, not {SHORT} only: most of an hour")
    options = parser.parse_args()
    chosen = {"widths": WIDTHS, "sides": SIDES} if options.all else SHORT
    wrong = []
    print(f"{'kernel':24}{'dtype':>9}{'sm':>4}{'warps':>6}{'registers':>10}{'shared':>8}{'stack':>6}  constants")
    for dtype in [options.dtype] if options.dtype else TYPES:
        found = launches(dtype, **chosen)
        for architecture in [options.arch] if options.arch else ARCHITECTURES:
            for launch, compiled in compile_launches(found, architecture):
                usage = resources(compiled)
                name, warps = launch.kernel.__name__, launch.options["num_warps"]
                print(
                    f"{name:24}{dtype:>9}{architecture:>4}{warps:>6}{usage['REG']:>10}{compiled.metadata.shared:>8}"
                    f"{usage['STACK']:>6}  {launch}",
                    flush=True,
                )
                found_here = problems(launch, compiled) + narrow_rows(launch, compiled)
                wrong += [f"{launch} {dtype} sm_{architecture}: {problem}" for problem in found_here]
    sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
