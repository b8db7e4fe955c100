"""Images per second of whole networks, unpruned and with Cropr, on the device at hand.

python -m benchmarks.models.end_to_end [--models vit_small_patch16_224 ...] [--repeats 9]
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from benchmarks.utils.results import RESULTS, Results, environment
from examples import photos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = options.out or RESULTS / f"{device}_end_to_end.json"
    _, images = photos.load_photos(torch.device(device))
    rows = []
    results = Results(out, environment(device) | {"batch": len(images), "dtype": "float32"})
    for model in options.models:
        rows += photos.compare([model], images, options.repeats)
        results.replace([dataclasses.asdict(row) for row in rows])
    print(photos.table(rows))
    print(out)


if __name__ == "__main__":
    main()
