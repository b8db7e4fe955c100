"""Ways back to a full map, by the same recipe: a pretrained ViT-Ti on street scenes (CamVid), mIoU.

python -m benchmarks.accuracy.segmentation --data FOLDER [--epochs 8] [--seeds 2 3 4] [--methods
...] [--out FILE]

FOLDER holds camvid/{train,trainannot,val,valannot} and the ViT-Ti of data.py. Photos are resized to
240 x 180, and the network sees crops of 160 x 160, 100 patches. All methods drop 7 of them after
each block, from half of the epochs on, by calibrated, fixed queries, unless their name says
otherwise. A fast last block has the learning rate of the new parameters, the decoders. An
interrupted run resumes.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.dense import arguments, shared_options, sweep
from benchmarks.utils.results import RESULTS
from cropr_kernels.train import Config

LEARNED: dict[str, Any] = dict(rate=7, curriculum=0.5, calibrate=128)
PRUNED = LEARNED | dict(fixed_queries=True)
SIZE = (240, 180)  # of the photos
SIDE = 160  # of the crops
METHODS: dict[str, dict[str, Any]] = {
    "no pruning": {},
    "LLF": PRUNED | dict(llf=True),
    "LLF, host": PRUNED | dict(llf=True, restore="track_parent"),
    "merging, LLF, host": PRUNED | dict(llf=True, restore="track_parent", merge=True),
    "token concatenation": PRUNED,
    "cross-attention": PRUNED,
    "cross-attention + concatenation": PRUNED,
    "MHSA + concatenation": PRUNED,
    "DToP": LEARNED | dict(calibrate=0),
    "no pruning, last block fast": dict(last_block_lr_scale=10.0),
    "LLF, last block fast": PRUNED | dict(llf=True, last_block_lr_scale=10.0),
    "LLF, random": PRUNED | dict(llf=True, calibrate=0),
    "LLF, variance": PRUNED | dict(llf=True, calibrate=0),
    "LLF, learned queries": LEARNED | dict(llf=True),
    "LLF, learned queries, random start": LEARNED | dict(llf=True, calibrate=0),
}


def shrink(source: Path, target: Path) -> None:
    """Write photos and label maps at SIZE."""
    from PIL import Image

    for part in ("train", "trainannot", "val", "valannot"):
        (target / part).mkdir(parents=True)
        resampling = (
            Image.Resampling.NEAREST if part.endswith("annot") else Image.Resampling.BICUBIC
        )
        for path in sorted((source / part).iterdir()):
            with Image.open(path) as image:
                image.resize(SIZE, resampling).save(target / part / f"{path.stem}.png")


def main() -> None:
    options = arguments(__doc__, METHODS, epochs=8, lr=8e-4).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "camvid"
        shrink(options.data / "camvid", folder)

        def recipe(seed: int, name: str) -> Config:
            return Config(
                task="segmentation",
                data=str(folder),
                train_split=("train", "trainannot"),
                val_split=("val", "valannot"),
                num_classes=11,
                ignore_index=11,
                img_size=(SIDE, SIDE),
                batch_size=8,
                lr_schedule="poly",
                layer_decay=0.9,
                head_lr_scale=10.0,
                scale=(0.75, 1.25),
                color_jitter=0.2,
                **shared_options(options, seed),
                **METHODS[name],
            )

        out = options.out or RESULTS / "segmentation.json"
        sweep(options, out, recipe, lambda task: task(torch.zeros(1, 3, SIDE, SIDE)))


if __name__ == "__main__":
    main()
