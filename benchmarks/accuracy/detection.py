"""Pruning under a detector: a pretrained ViT-Ti on blood cells (BCCD boxes) or COCO128 (masks).

python -m benchmarks.accuracy.detection --data FOLDER [--set bccd|coco128] [--one-category]
[--photos N] [--batch 4]
                               [--epochs 6] [--seeds 2 3 4] [--methods ...]

FOLDER holds bccd/ and coco128/, each with images/ and annotations.json, and the ViT-Ti of data.py.
The network sees 256 x 256, 256 patches; all methods drop 20 after each block (of 10: 22 % stay) by
calibrated, fixed queries, unless their name says otherwise, and Last Layer Fusion restores the map.
COCO128 has no held-out photos: its figures measure memorization of the training photos. A CPU
memorizes less in minutes: N of the photos, drawn by the seed, and with --one-category the location
of objects, not their class. An interrupted run resumes.
"""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.dense import arguments, shared_options, sweep
from benchmarks.utils.results import RESULTS
from cropr_kernels.train import Config

LEARNED: dict[str, Any] = dict(rate=20, llf=True, calibrate=128)
PRUNED = LEARNED | dict(fixed_queries=True)
METHODS: dict[str, dict[str, Any]] = {
    "no pruning": {},
    "Cropr": PRUNED,
    "Cropr, host": PRUNED | dict(restore="track_parent"),
    "Cropr, merging, host": PRUNED | dict(restore="track_parent", merge=True),
    "random": PRUNED | dict(calibrate=0),
    "variance": PRUNED | dict(calibrate=0),
    "attention top-k": PRUNED | dict(calibrate=0),
    "Cropr, learned queries": LEARNED,
    "Cropr, windows": LEARNED | dict(rate=5, calibrate=0, window=8, global_blocks=(2, 5, 8, 11)),
}
SIDE = 256
# A photo of this size has few objects: a quarter of torchvision's regions is enough. Each detection
# gets a mask, which costs more than all else.
REGIONS = (
    "box_batch_size_per_image=128",
    "rpn_pre_nms_top_n_train=500",
    "rpn_post_nms_top_n_train=500",
)
DETECTIONS = {"bccd": 100, "coco128": 50}


def split_of(
    source: Path, target: Path, seed: int, photos: int | None, one_category: bool
) -> tuple[Path, Path]:
    """Write the annotations of the photos for training (at most `photos`) and for evaluation."""
    dataset = json.loads((source / "annotations.json").read_text())
    if one_category:
        dataset["categories"] = [{"id": 1, "name": "object"}]
        dataset["annotations"] = [
            {**annotation, "category_id": 1} for annotation in dataset["annotations"]
        ]
    paths = []
    for split in ("train", "val"):
        images = [
            image
            for image in dataset["images"]
            if (image.get("split", split) == "val") == (split == "val")
        ]
        if photos is not None and (split == "train" or len(images) == len(dataset["images"])):
            images = random.Random(seed).sample(images, min(photos, len(images)))
        ids = {image["id"] for image in images}
        kept = [
            annotation for annotation in dataset["annotations"] if annotation["image_id"] in ids
        ]
        paths.append(target / f"{split}_{seed}.json")
        paths[-1].write_text(json.dumps({**dataset, "images": images, "annotations": kept}))
    return paths[0], paths[1]


def main() -> None:
    parser = arguments(__doc__, METHODS, epochs=6, lr=2e-4)
    parser.add_argument("--set", choices=["bccd", "coco128"], default="bccd")
    parser.add_argument("--one-category", action="store_true")
    parser.add_argument("--photos", type=int)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:

        def recipe(seed: int, name: str) -> Config:
            source = options.data / options.set
            train_split, val_split = split_of(
                source, Path(temporary), seed, options.photos, options.one_category
            )
            return Config(
                task="detection",
                masks=options.set == "coco128",
                data=str(source),
                train_split=(".", str(train_split)),
                val_split=(".", str(val_split)),
                img_size=(SIDE, SIDE),
                channels=64,
                detector_options=(*REGIONS, f"box_detections_per_img={DETECTIONS[options.set]}"),
                batch_size=options.batch,
                layer_decay=0.8,
                head_lr_scale=5.0,
                scale=(0.8, 1.2),
                clip_grad=5.0,
                **shared_options(options, seed),
                **METHODS[name],
            )

        out = options.out or RESULTS / f"detection_{options.set}.json"
        sweep(
            options,
            out,
            recipe,
            lambda task: task.backbone.forward_features(torch.zeros(1, 3, SIDE, SIDE)),
        )


if __name__ == "__main__":
    main()
