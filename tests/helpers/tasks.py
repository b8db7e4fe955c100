"""Backbones of the tasks, and scenes on which each recipe learns."""

import json

import pytest
import torch

from helpers.models import reference_vit, timm_eva, timm_vit

BACKBONES = {
    "reference": lambda: reference_vit(num_classes=0),
    "reference, average": lambda: reference_vit(
        num_classes=0, class_token=False, global_pool="avg"
    ),
    "timm ViT": lambda: timm_vit(num_classes=0, dynamic_img_size=True),
    "timm EVA-02": lambda: timm_eva(num_classes=0, dynamic_img_size=True),
}
CLASSES = 3


def check_a_step_and_its_maps(task):
    """Check that the loss is finite and reaches every new parameter, and that maps have the size of
    the images."""
    images, target = torch.randn(2, 3, 64, 64), torch.randint(0, CLASSES, (2, 64, 64))
    target[0] = 255  # an empty annotation
    losses = task(images, target)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    unused = [name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()]
    # k_bias and the like have no gradient at all
    assert [
        name for name in unused if "queries" in name or "head" in name or "aggregator" in name
    ] == []
    task.eval()
    with torch.no_grad():
        assert task(images).shape == (2, CLASSES, 64, 64)
        predictions = task.predictions(images)
        assert [p.shape for p in predictions] == [(2, 64, CLASSES)] * len(predictions)


def write_scenes(folder, count):
    """Write squares of two colors on noise: photos, label maps (3: ignored) and COCO
    annotations."""
    image = pytest.importorskip("PIL.Image", reason="needs the train extra")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for part in ("photos", "labels"):
            (folder / split / part).mkdir(parents=True)
        coco = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 7, "name": "red"}, {"id": 9, "name": "blue"}],
        }
        for i in range(count):
            pixels = torch.randint(0, 100, (64, 80, 3), generator=generator, dtype=torch.uint8)
            labels = torch.zeros(64, 80, dtype=torch.uint8)
            labels[0] = 3
            coco["images"].append({"id": i, "file_name": f"{i:02}.png", "width": 80, "height": 64})
            for category in range(2 if i else 0):  # the first photo is empty
                top, left = torch.randint(0, 32, (2,), generator=generator).tolist()
                left = left // 2 + 40 * category
                pixels[top : top + 24, left : left + 24, 2 * category] = 250
                labels[top : top + 24, left : left + 24] = category + 1
                corners = [left, top, left + 24, top, left + 24, top + 24, left, top + 24]
                coco["annotations"].append(
                    {"id": len(coco["annotations"]) + 1, "image_id": i,
                    "category_id": 7 + 2 * category, "iscrowd": 0,
                     "bbox": [left, top, 24, 24], "area": 576, "segmentation": [corners]}
                )  # fmt: skip
            image.fromarray(pixels.numpy()).save(folder / split / "photos" / f"{i:02}.png")
            image.fromarray(labels.numpy()).save(folder / split / "labels" / f"{i:02}.png")
        (folder / split / "boxes.json").write_text(json.dumps(coco))
    return folder


RECIPES = {
    "segmentation": dict(
        task="segmentation", train_split=("train/photos", "train/labels"),
        val_split=("val/photos", "val/labels"),
        num_classes=3, ignore_index=3, img_size=(64, 64), scale=(0.9, 1.1), lr=3e-3, epochs=12,
        curriculum=0.5,
    ),
    "detection": dict(
        task="detection", train_split=("train/photos", "train/boxes.json"),
        val_split=("val/photos", "val/boxes.json"), img_size=(64, 64), scale=(0.9, 1.2), lr=1e-3,
        epochs=10,
        window=4, global_blocks=(1, 3), flip=0.0, channels=16,
    ),
}  # fmt: skip
