"""Metrics of a task on held-out data: top-1, mIoU, COCO AP."""

import time
import warnings
from collections import defaultdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from ..tasks import Classifier, Detector, Segmenter, Task
from ..utils.optional import import_optional
from ..utils.progress import each
from .config import Config
from .precision import autocast


def evaluate(
    task: Task,
    loader: DataLoader[Any],
    config: Config,
    num_classes: int,
    device: torch.device,
    show: bool,
) -> dict[str, Any]:
    """Measure a task over a loader in eval mode, reduced over all processes.

    Classification: top-1, top-5, and `aux`, the top-1 of every auxiliary head. Segmentation: mIoU
    and pixel accuracy by sliding window. Detection: AP, AP50, and those of masks. All in percent;
    `skipped` samples could not be read.
    """
    metrics: dict[str, Any] = {
        "classification": Top,
        "segmentation": Overlap,
        "detection": Precision,
    }
    was_training = task.training
    task.eval()
    metric = metrics[config.task](config, num_classes, device)
    skipped = 0
    num_images = 0
    seconds = 0.0
    try:
        with torch.no_grad(), autocast(config, device):
            for images, target, replaced in each(loader, "evaluation", show=show):
                start = time.perf_counter()
                metric.update(task, images, target)
                seconds += time.perf_counter() - start
                skipped += replaced
                num_images += len(images)
    finally:
        task.train(was_training)
    values = metric.compute()
    total = torch.tensor([skipped, num_images], device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return values | {
        "skipped": int(total[0]),
        "images": int(total[1]),
        "seconds": round(seconds, 2),
    }


def _percent(value: Tensor) -> float:
    return round(100 * float(value), 3)


class Top:
    """Top-1 and top-5 of the output, and top-1 of every auxiliary head."""

    def __init__(self, config: Config, num_classes: int, device: torch.device):
        accuracy = import_optional(
            "torchmetrics.classification", "train", "cropr train"
        ).MulticlassAccuracy
        metric = partial(accuracy, num_classes, average="micro")
        self.device = device
        self.top = {f"top-{k}": metric(top_k=k).to(device) for k in (1, 5) if k <= num_classes}
        self.aux: dict[int, Any] = defaultdict(lambda: metric().to(device))

    def update(self, task: Classifier, images: Tensor, target: Tensor) -> None:
        *aux, logits = task.predictions(images.to(self.device))
        target = target.to(self.device)
        for metric in self.top.values():
            metric.update(logits, target)
        for index, prediction in enumerate(aux):
            self.aux[index].update(prediction, target)

    def compute(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            name: _percent(metric.compute()) for name, metric in self.top.items()
        }
        return values | (
            {"aux": [_percent(metric.compute()) for metric in self.aux.values()]}
            if self.aux
            else {}
        )


class Overlap:
    """Mean intersection over union of the classes that occur, and pixel accuracy."""

    def __init__(self, config: Config, num_classes: int, device: torch.device):
        metrics = import_optional("torchmetrics.classification", "train", "cropr train")
        pixels = metrics.MulticlassAccuracy(
            num_classes, average="micro", ignore_index=config.ignore_index
        )
        overlap = metrics.MulticlassJaccardIndex(num_classes, ignore_index=config.ignore_index)
        self.config = config
        self.device = device
        self.metrics = {"mIoU": overlap.to(device), "pixels": pixels.to(device)}
        height, width = config.img_size
        self.stride = config.stride or (max(height * 2 // 3, 1), max(width * 2 // 3, 1))

    def update(self, task: Segmenter, images: Tensor, target: Tensor) -> None:
        logits = task.slide(images.to(self.device), self.config.img_size, self.stride)
        for metric in self.metrics.values():
            metric.update(logits.argmax(1), target.to(self.device))

    def compute(self) -> dict[str, Any]:
        return {name: _percent(metric.compute()) for name, metric in self.metrics.items()}


class Precision:
    """COCO average precision of boxes, and of masks."""

    def __init__(self, config: Config, num_classes: int, device: torch.device):
        iou_types = ("bbox", "segm") if config.masks else ("bbox",)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.metric = import_optional(
                "torchmetrics.detection", "train", "cropr train"
            ).MeanAveragePrecision(iou_type=iou_types, backend="faster_coco_eval")
        self.device = device
        self.masks = config.masks

    def update(
        self, task: Detector, images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> None:
        detections = task([image.to(self.device) for image in images])
        for detected, target in zip(detections, targets):
            prediction = {name: detected[name].cpu() for name in ("boxes", "scores", "labels")}
            truth = {name: target[name] for name in ("boxes", "labels")}
            if self.masks:
                prediction["masks"] = (detected["masks"][:, 0] > 0.5).cpu()
                truth["masks"] = target["masks"].bool()
            self.metric.update([prediction], [truth])

    def compute(self) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = self.metric.compute()
        prefixes = {"bbox_": "AP box", "segm_": "AP mask"} if self.masks else {"": "AP box"}
        precisions: dict[str, float] = {}
        for prefix, name in prefixes.items():
            precisions |= {
                name: _percent(values[f"{prefix}map"]),
                f"{name} 50": _percent(values[f"{prefix}map_50"]),
            }
        # -1: there are no objects
        return {name: max(value, 0.0) for name, value in precisions.items()}


MAIN = {"classification": "top-1", "segmentation": "mIoU", "detection": "AP box"}
