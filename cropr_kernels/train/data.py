"""Datasets of every task, augmentation, and batches that interruptions do not change.

A sample depends on (seed, epoch, index) only, and the samples of a step on (seed, epoch, step).
"""

import contextlib
import os
import random
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..utils.images import describe_skipped, find_photos, open_photo
from ..utils.optional import import_optional
from .coco import read_coco
from .config import Config

TRIES = 16  # samples tried, from one that cannot be read on
# The address of a Unix socket has 107 bytes
_LONGEST_FOLDER = 107 - len("/pymp-01234567/listener-01234567")


class LabeledDataset(Protocol):
    """A map-style dataset of (image, target)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


class Data(NamedTuple):
    """Datasets of a run, and the names of their classes."""

    train: LabeledDataset
    val: LabeledDataset
    classes: list[str]  # without the background of detection


def seed_of(*parts: int) -> int:
    """Hash several numbers to one seed."""
    return zlib.crc32(repr(parts).encode())


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all generators in this context, and restore their state after it."""
    from numpy import random as numpy  # a dependency of torchvision

    python_state = random.getstate()
    numpy_state = numpy.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        numpy.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.set_state(numpy_state)


class Sample(NamedTuple):
    image: Tensor
    target: Any
    skipped: int  # unreadable samples that this one replaces


class Samples(Dataset[Sample]):
    """Samples by (epoch, index), with the random numbers of that pair.

    A sample that cannot be read is replaced by the next one that can, and counted.
    """

    def __init__(self, dataset: LabeledDataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        for skipped in range(min(TRIES, len(self))):
            readable = (index + skipped) % len(self)
            try:
                with seeded(seed_of(self.seed, epoch, readable)):
                    image, target = self.dataset[readable]
                return Sample(image, target, skipped)
            # Pillow's errors for damaged files and other formats
            except (OSError, SyntaxError) as error:
                cause = error
        raise RuntimeError(
            f"{TRIES} samples in a row from {index} on cannot be used; the last one: {cause}"
        ) from cause


class Batches:
    """Batches of one process, as keys (epoch, index): the order of an epoch, shared by all
    processes.

    Step s of an epoch takes the same batch_size samples for any number of processes and accumulated
    parts; the last incomplete batch of an epoch is dropped.
    """

    def __init__(
        self,
        count: int,
        config: Config,
        epoch: int,
        *,
        rank: int = 0,
        world: int = 1,
        first_step: int = 0,
    ):
        share = config.accumulate * world
        size = f"train: batch_size={config.batch_size}"
        if config.batch_size % share:
            raise ValueError(f"{size} must be a multiple of accumulate x processes = {share}")
        if (config.mixup or config.cutmix) and config.batch_size // share % 2:
            raise ValueError(
                f"{size} must be a multiple of 2 x {share}: mixup and cutmix take images in pairs"
            )
        if count < config.batch_size:
            raise ValueError(f"{size} must be at most the {count} training samples")
        self.count = count
        self.config = config
        self.epoch = epoch
        self.rank = rank
        self.world = world
        self.first_step = first_step
        self.steps = count // config.batch_size

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.config.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator)
        size = self.config.batch_size
        for step in range(self.first_step, self.steps):
            batch = order[step * size : (step + 1) * size]
            for part in batch.view(self.config.accumulate, self.world, -1)[:, self.rank].tolist():
                yield [(self.epoch, index) for index in part]


Batch = tuple[Any, Any, int]  # images, targets, and the number of replaced samples


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack images and targets, except for detection, and count replaced samples."""
    images, targets, skipped = ([*part] for part in zip(*samples))
    if not isinstance(targets[0], dict):
        images, targets = default_collate(images), default_collate(targets)
    return images, targets, sum(skipped)


def val_loader(
    dataset: LabeledDataset, config: Config, *, rank: int = 0, world: int = 1
) -> DataLoader[Any]:
    """Load every sample once, shared by the processes; one image at a time if sizes differ."""
    size = config.batch_size // config.accumulate if config.task == "classification" else 1
    keys = [(-1, index) for index in range(rank, len(dataset), world)]
    return make_loader(
        dataset, [keys[start : start + size] for start in range(0, len(keys), size)], config
    )


def make_loader(
    dataset: LabeledDataset, batches: Iterable[list[tuple[int, int]]], config: Config
) -> DataLoader[Any]:
    """Load samples of a dataset in batches of keys (epoch, index)."""
    workers = min(config.workers, os.cpu_count() or 1)
    folder = tempfile.gettempdir()
    # Otherwise workers fail silently, and training waits
    if workers and len(os.fsencode(folder)) > _LONGEST_FOLDER:
        raise ValueError(
            "config: workers send images through sockets in the folder for temporary files, "
            "whose path must have at "
            f"most {_LONGEST_FOLDER} bytes, got {folder}: set TMPDIR to another, or workers=0"
        )
    return DataLoader(
        Samples(dataset, config.seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )


def load_data(config: Config) -> Data:
    """Load the dataset of a configuration; raises ValueError if it does not fit its task."""
    parts = [_parts(config, option) for option in ("train_split", "val_split")]
    if config.task == "classification":
        folder = import_optional("torchvision.datasets", "train", "cropr train").ImageFolder
        for [path] in parts:
            skipped: Counter[str] = Counter()
            find_photos(path, skipped)
            if skipped:
                warnings.warn(f"{path}:{describe_skipped(skipped)}", stacklevel=2)
        pairs = zip(parts, classification_transforms(config))
        train, val = (folder(*paths, transform, loader=open_photo) for paths, transform in pairs)
    else:
        dataset: Any = LabelMaps if config.task == "segmentation" else Boxes
        train, val = dataset(*parts[0], config, train=True), dataset(*parts[1], config, train=False)
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            "train and val have different classes: "
            f"{', '.join(differing[:5]) or 'they differ in order'}"
        )
    return Data(train, val, train.classes)


def _parts(config: Config, option: str) -> list[Path]:
    """Return the paths of one part of the dataset; all exist."""
    names = getattr(config, option)
    count = 1 if config.task == "classification" else 2
    if len(names) != count:
        raise ValueError(f"config: {option} must be {count} paths for {config.task}, got {names!r}")
    paths = [Path(config.data) / name for name in names]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"config: {option} names {path}, which does not exist")
    return paths


def classification_transforms(config: Config) -> tuple[Any, Any]:
    """Create timm's transforms for training and evaluation."""
    create_transform = import_optional("timm.data", "train", "cropr train").create_transform
    size = (3, *config.img_size)
    create = partial(
        create_transform, size, mean=config.mean, std=config.std, interpolation="bicubic"
    )
    training = create(
        is_training=True,
        scale=config.scale,
        hflip=config.flip,
        color_jitter=config.color_jitter or None,
        auto_augment=config.auto_augment or None,
        re_prob=config.erasing,
    )
    return training, create(is_training=False, crop_pct=0.875)


def _to_tensor(image: Any) -> Tensor:
    return import_optional(
        "torchvision.transforms.v2.functional", "train", "cropr train"
    ).pil_to_tensor(image)


_LABEL_MODES = ("1", "L", "P", "I", "I;16")


class LabelMaps(Dataset[tuple[Tensor, Tensor]]):
    """Photos and label maps of the same names: (3, H, W) and (H, W) int64.

    Randomly resized, cropped, flipped and jittered in training; unchanged in evaluation. A training
    photo without a labelled pixel counts as one that cannot be read.
    """

    def __init__(self, images: Path, labels: Path, config: Config, *, train: bool):
        by_name = {path.relative_to(labels).with_suffix(""): path for path in labels.rglob("*.png")}
        photos = find_photos(images)
        missing = [
            path for path in photos if path.relative_to(images).with_suffix("") not in by_name
        ]
        if missing or not photos:
            problem = (
                f"{missing[0]} has no label map in {labels}"
                if missing
                else f"there are no photos in {images}"
            )
            raise ValueError(f"segmentation: {problem}")
        self.pairs = [(path, by_name[path.relative_to(images).with_suffix("")]) for path in photos]
        self.config = config
        self.train = train
        self.classes = [str(index) for index in range(config.num_classes)]
        if not any(self._is_labelled(path) for _, path in self.pairs):
            raise ValueError(
                f"segmentation: a label map in {labels} must have a pixel of another label than "
                f"ignore_index={config.ignore_index}, none has"
            )

    def _is_labelled(self, path: Path) -> bool:
        with contextlib.suppress(OSError, SyntaxError):  # counted when it is a sample
            return bool((self._labels(path) != self.config.ignore_index).any())
        return False

    def _labels(self, path: Path) -> Tensor:
        """Read a label map: (1, H, W) int64."""
        with import_optional("PIL.Image", "train", "cropr train").open(path) as image:
            if image.mode not in _LABEL_MODES:
                raise ValueError(
                    f"segmentation: {path} must have one channel of integers or a palette (modes "
                    "of Pillow: "
                    f"{', '.join(_LABEL_MODES)}), got mode {image.mode}"
                )
            classes = _to_tensor(image).long()
        if self.config.reduce_zero_label:
            classes = torch.where(classes == 0, self.config.ignore_index, classes - 1)
        return classes

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        config = self.config
        photo_path, label_path = self.pairs[index]
        pixels = _to_tensor(open_photo(photo_path, upright=False))
        classes = self._labels(label_path)
        if pixels.shape[1:] != classes.shape[1:]:
            raise OSError(
                f"{label_path} is {tuple(classes.shape[1:])}, its photo {tuple(pixels.shape[1:])}"
            )
        highest = classes.where(classes != config.ignore_index, -1).max()
        if highest >= config.num_classes:
            raise ValueError(
                f"{label_path} has label {int(highest)}; labels must be below "
                f"num_classes={config.num_classes} or "
                f"ignore_index={config.ignore_index}"
            )
        if self.train and highest < 0:
            raise OSError(
                f"{label_path} has no labelled pixel, all are ignore_index={config.ignore_index}"
            )
        v2 = import_optional("torchvision.transforms.v2", "train", "cropr train")
        tv_tensors = import_optional("torchvision.tv_tensors", "train", "cropr train")
        image, label = tv_tensors.Image(pixels), tv_tensors.Mask(classes)
        if self.train:
            fill = {type(image): 0, type(label): config.ignore_index}
            factor = random.uniform(*config.scale)
            jitter = config.color_jitter
            image, label = v2.Compose(
                [
                    v2.Resize([max(round(side * factor), 1) for side in image.shape[1:]]),
                    v2.RandomCrop(config.img_size, pad_if_needed=True, fill=fill),
                    v2.RandomHorizontalFlip(config.flip),
                    *([v2.ColorJitter(jitter, jitter, jitter)] if jitter else []),
                ]
            )(image, label)
        image = v2.functional.normalize(image.float() / 255, config.mean, config.std)
        return image.as_subclass(Tensor), label.as_subclass(Tensor)[0]


class Boxes(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Photos with COCO annotations: (3, H, W) in [0, 1] and {boxes, labels, image_id, and masks if
    configured}.

    Labels count the categories from 1, by id. Crowds and boxes without area are dropped.
    """

    def __init__(self, images: Path, annotations: Path, config: Config, *, train: bool):
        self.root = images
        self.annotations = annotations
        self.config = config
        self.train = train
        self.coco = read_coco(annotations, masks=config.masks)
        self.ids = sorted(self.coco.getImgIds())
        self.categories = sorted(self.coco.getCatIds())
        self.classes = [category["name"] for category in self.coco.loadCats(self.categories)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        v2 = import_optional("torchvision.transforms.v2", "train", "cropr train")
        tv_tensors = import_optional("torchvision.tv_tensors", "train", "cropr train")
        record = self.coco.loadImgs([self.ids[index]])[0]
        pixels = tv_tensors.Image(
            _to_tensor(open_photo(self.root / record["file_name"], upright=False))
        )
        size = tuple(pixels.shape[1:])
        annotations = self.coco.loadAnns(self.coco.getAnnIds(imgIds=[record["id"]]))
        objects = [
            entry
            for entry in annotations
            if not entry.get("iscrowd") and min(entry["bbox"][2:]) > 0
        ]
        boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float32).reshape(
            -1, 4
        )
        boxes[:, 2:] += boxes[:, :2]
        labels = [self.categories.index(entry["category_id"]) + 1 for entry in objects]
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
        if self.config.masks:
            if size != (record["height"], record["width"]):
                described = record["height"], record["width"]
                raise OSError(
                    f"{record['file_name']} is {size}, in {self.annotations} it is {described}"
                )
            masks = [self._mask(entry) for entry in objects]
            target["masks"] = tv_tensors.Mask(
                torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)
            )
        if self.train:
            pixels, target = v2.Compose(
                [
                    v2.ScaleJitter(self.config.img_size, self.config.scale),
                    v2.RandomCrop(self.config.img_size, pad_if_needed=True),
                    v2.RandomHorizontalFlip(self.config.flip),
                    v2.ClampBoundingBoxes(),
                    v2.SanitizeBoundingBoxes(min_size=1),
                ]
            )(pixels, target)
        tensors = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return (pixels.float() / 255).as_subclass(Tensor), {**tensors, "image_id": self.ids[index]}

    def _mask(self, entry: dict[str, Any]) -> Tensor:
        try:
            return torch.from_numpy(self.coco.annToMask(entry))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"detection: {self.annotations}, annotation {entry['id']}: {error}"
            ) from error


def mixing(config: Config, classes: int) -> Any:
    """Create timm's mixup and cutmix, or None. Labels are smoothed by the loss."""
    if not config.mixup and not config.cutmix:
        return None
    mixup = import_optional("timm.data", "train", "cropr train").Mixup
    return mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=classes)
