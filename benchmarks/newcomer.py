"""Minutes from a clone to the first table: how often a pruned model of yours says what the unpruned one says.

python -m benchmarks.newcomer REPOSITORY WEIGHTS PHOTOS

Runs the three commands a newcomer types, in an empty folder: git clone, make install, cropr calibrate. REPOSITORY is an
address or a local clone, WEIGHTS a weight file of a Vision Transformer, PHOTOS a folder.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository")
    parser.add_argument("weights", type=Path)
    parser.add_argument("photos", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            ["git", "clone", "--quiet", options.repository, "cropr"],
            ["make", "-C", "cropr", "install"],
            ["cropr/.venv/bin/cropr", "calibrate", options.weights.resolve(), options.photos.resolve()],
        ]
        times = []
        for command in commands:
            words = " ".join(map(str, command))
            print(f"$ {words}", flush=True)
            start = time.perf_counter()
            subprocess.run(command, cwd=folder, check=True)
            times.append((words, time.perf_counter() - start))
        megabytes = subprocess.run(["du", "-sm", folder], check=True, capture_output=True, text=True).stdout.split()[0]
    for words, seconds in times:
        print(f"{seconds:7.1f} s  {words}")
    print(f"{sum(seconds for _, seconds in times):7.1f} s in all, {megabytes} MB of disk")


if __name__ == "__main__":
    main()
