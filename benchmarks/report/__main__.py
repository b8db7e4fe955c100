"""Write the tables and plots of the README and of docs/, and the CSV files of benchmarks/results/,
from its JSON.

python -m benchmarks.report [--check]      --check: fail if a page or a file is not what the results
say
"""

import argparse
import sys

from benchmarks.report import comparison, measured, off_the_shelf, schedules, training
from benchmarks.report.pages import PAGES, csv_files, stored_csv_files
from benchmarks.report.render import render
from benchmarks.utils.results import RESULTS
from cropr_kernels.utils.io import write_text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    pages = {page: render(page.read_text(), sections) for page, sections in PAGES.items()}
    files = csv_files()
    if options.check:
        check(outdated=[page.name for page, text in pages.items() if page.read_text() != text])
        stored = stored_csv_files()
        check(
            outdated=[
                name for name in sorted(files | stored) if files.get(name) != stored.get(name)
            ]
        )
        return
    for page, text in pages.items():
        write_text(page, text)
    for name, text in files.items():
        write_text(RESULTS / name, text)
    for module in (measured, comparison, off_the_shelf, schedules, training):
        module.plot()


def check(outdated: list[str]) -> None:
    if outdated:
        sys.exit(f"{outdated[0]} differs from the results: run python -m benchmarks.report")


if __name__ == "__main__":
    main()
