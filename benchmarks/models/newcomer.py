"""Minutes from a clone to the first table: the agreement of a pruned model of yours.

python -m benchmarks.models.newcomer REPOSITORY WEIGHTS PHOTOS [--out
benchmarks/results/newcomer.json]

Runs the three commands of a newcomer in an empty folder: git clone, make install, cropr calibrate.
REPOSITORY is an address or a local clone, WEIGHTS a weight file of a Vision Transformer, PHOTOS a
folder. One row per PyTorch: with CUDA, or without by TORCH_INDEX or a constraint of pip.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.utils.results import RESULTS, Results, environment


def first_word(command: list[str]) -> str:
    """Return the first word that a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository")
    parser.add_argument("weights", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "newcomer.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "clone": ["git", "clone", "--quiet", options.repository, "cropr"],
            "install": ["make", "-C", "cropr", "install"],
            "calibrate": [
                "cropr/.venv/bin/cropr",
                "calibrate",
                options.weights.resolve(),
                options.photos.resolve(),
            ],
        }
        seconds = {}
        for name, command in commands.items():
            print("$", *command, flush=True)
            start = time.perf_counter()
            subprocess.run(command, cwd=folder, check=True)
            seconds[name] = round(time.perf_counter() - start, 1)
        print_version = [
            f"{folder}/cropr/.venv/bin/python",
            "-c",
            "import torch; print(torch.__version__)",
        ]
        version = first_word(print_version)
        megabytes = first_word(["du", "-s", "--block-size=MB", folder])
    row = {"installed": version, "seconds": seconds, "disk": megabytes}
    results = Results(options.out, environment("cpu"), keys=("installed",))
    results.replace([*(row for row in results.rows if row["installed"] != version), row])
    print(
        f"{sum(seconds.values()):.0f} s in all ({seconds}), {megabytes} of disk, torch {version}: "
        f"{options.out}"
    )


if __name__ == "__main__":
    main()
