"""Write the tables and plots of the README and of docs/ from benchmarks/results/. Run it after a benchmark.

python -m benchmarks.report [--check]      --check: fail if a page is not what the results say
"""

import argparse
import sys

from benchmarks.report import comparison, measured, schedules, training
from benchmarks.report.pages import PAGES
from benchmarks.report.render import render
from cropr_kernels.utils.io import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for page, sections in PAGES.items():
        text = page.read_text()
        fresh = render(text, sections)
        if not options.check:
            write_text(page, fresh)
        elif fresh != text:
            sys.exit(f"{page.name} differs from the results: run python -m benchmarks.report")
    if not options.check:
        for module in (measured, comparison, schedules, training):
            module.plot()


if __name__ == "__main__":
    main()
