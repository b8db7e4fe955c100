"""Images per second of whole networks, unpruned and with Cropr, on the device at hand.

python benchmarks/end_to_end.py [--models vit_small_patch16_224 ...] [--repeats 9]
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from common import RESULTS, environment, save

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import photos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = options.out or RESULTS / f"{device}_end_to_end.json"
    _, images = photos.load_photos(torch.device(device))
    env, rows = environment(device), []
    env["batch"], env["dtype"] = len(images), "float32"
    for model in options.models:
        rows += photos.compare([model], images, options.repeats)
        save(out, env, [dataclasses.asdict(row) for row in rows])
    print(photos.table(rows))
    print(out)


if __name__ == "__main__":
    main()
