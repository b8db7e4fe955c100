"""The configuration of a training run: options, defaults and published recipes."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..pruning.fusion import SAVED_RESTORE, Restore


@dataclass(frozen=True)
class Config:
    """A training run, written as config.json beside its checkpoint.

    Raises ValueError for invalid values.
    """

    # task, data and model
    task: Literal["classification", "segmentation", "detection"] = "classification"
    data: str = ""  # root folder of the dataset
    # Parts of the dataset, relative to its root: a folder of one folder per class; images and label
    # maps; images and COCO annotations
    train_split: tuple[str, ...] = ("train",)
    val_split: tuple[str, ...] = ("val",)
    model: str = "vit_tiny_patch16_224"  # a preset of this package, or a timm model
    pretrained: bool = False  # load timm's weights
    weights: str = ""  # or those of a local file
    model_options: tuple[str, ...] = ()  # further options of the model's constructor, as name=value
    # Height and width of the images the network is trained at
    img_size: tuple[int, int] = (224, 224)
    patch_size: int = 0  # 0: that of the model
    global_pool: str = ""  # classification; empty: that of the model
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    # pruning: one schedule, or none of them for no pruning
    rate: int | None = None
    keep: tuple[int, ...] | None = None
    ratio: float | None = None
    const: tuple[int, int] | None = None
    llf: bool = False
    # With llf: tokens as they were pruned, or with the change of their parent
    restore: Restore = "as_pruned"
    merge: bool = False
    curriculum: float = 0.0  # share of the epochs over which pruning increases from none
    num_queries: int = 1  # classification; dense tasks have one per patch
    # Training photos from which queries are computed before the first step; None: 128 for
    # pretrained networks, else 0
    calibrate: int | None = None
    fixed_queries: bool = False  # calibrated queries are not trained, without auxiliary heads
    # detection: patches on a side of an attention window; 0: attention over the full image
    window: int = 0
    global_blocks: tuple[int, ...] = ()  # detection: blocks with attention over the full image

    # optimization
    epochs: int = 10
    warmup_epochs: float = 0.0
    batch_size: int = 64  # images a step, over all processes and accumulated batches
    accumulate: int = 1
    lr: float = 1e-4  # at the full batch
    lr_schedule: Literal["cosine", "poly"] = "cosine"
    poly_power: float = 0.9
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    # Of new parameters: decoders, and Cropr modules except their queries
    head_lr_scale: float = 1.0
    query_lr_scale: float = 1.0  # of the queries
    last_block_lr_scale: float = 1.0  # of the last block, which sees unfamiliar tokens with LLF
    drop_path: float = 0.0
    clip_grad: float = 0.0  # largest norm of the gradient; 0: unlimited
    amp: Literal["none", "auto", "bfloat16", "float16"] = "none"  # auto: bfloat16 if it is fast
    ema: float = 0.0  # highest decay of the weight average, which is evaluated as well; 0: none
    grad_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun
    seed: int = 0
    workers: int = 4
    device: str = "auto"

    # augmentation
    # classification: share of the area; else: of the image's size
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    auto_augment: str = ""  # classification, timm's notation, such as rand-m9-mstd0.5-inc1
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    color_jitter: float = 0.0

    # segmentation
    num_classes: int = 0  # 0: that of the dataset; required for segmentation
    ignore_index: int = 255
    reduce_zero_label: bool = False  # label 0 is not a class (ADE20k)
    # Of the sliding window in evaluation; default two thirds of img_size
    stride: tuple[int, int] | None = None

    # detection
    masks: bool = False  # also instance segmentation
    channels: int = 256  # of the feature pyramid
    # Options of torchvision's detector, as name=value: see tasks.Detector
    detector_options: tuple[str, ...] = ()

    # writing
    save_steps: int = 500
    log_steps: int = 20
    eval_epochs: int = 1
    max_bad_steps: int = 20  # consecutive steps without a finite loss before the run stops

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(
                self, field.name, _coerce(field.name, getattr(self, field.name), _HINTS[field.name])
            )
        for allowed, (within, names) in _RANGES.items():
            for name in names.split():
                self._require(name, within(getattr(self, name)), allowed)
        self.options_of("model_options")
        self.options_of("detector_options")
        schedules = [name for name, value in self.schedule.items() if value is not None]
        if len(schedules) > 1:
            raise ValueError(f"config: set one schedule, got {' and '.join(schedules)}")
        steps = zip(self.stride or (1, 1), self.img_size)
        is_classification = self.task == "classification"
        prunes_pyramid = self.task == "detection" and self.prunes
        for name, holds, allowed in [
            (
                "accumulate",
                self.batch_size % self.accumulate == 0,
                f"a divisor of batch_size={self.batch_size}",
            ),
            ("std", min(self.std) > 0, "> 0"),
            ("calibrate", (self.calibrate or 0) >= 0, ">= 0"),
            ("ema", not (self.ema and self.parallel == "fsdp"), "0 with parallel=fsdp"),
            (
                "num_queries",
                is_classification or self.num_queries == 1,
                f"1 for {self.task}, which has one per patch",
            ),
            (
                "num_classes",
                self.num_classes >= 1 or self.task != "segmentation",
                ">= 1 for segmentation",
            ),
            (
                "llf",
                self.llf or not prunes_pyramid,
                "true for detection: the pyramid needs the full map",
            ),
            (
                "stride",
                all(1 <= step <= side for step, side in steps),
                f"from 1 to img_size={self.img_size}",
            ),
        ]:
            self._require(name, holds, allowed)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"config: {name} must be {allowed}, got {getattr(self, name)!r}")

    @property
    def schedule(self) -> dict[str, Any]:
        """The schedule as `cropr.apply` takes it."""
        return {name: getattr(self, name) for name in ("rate", "keep", "ratio", "const")}

    def options_of(self, field: Literal["model_options", "detector_options"]) -> dict[str, Any]:
        """The name=value pairs of a field as keyword arguments: JSON values, or else text."""
        options: dict[str, Any] = {}
        for option in getattr(self, field):
            name, equals, value = option.partition("=")
            if not equals:
                raise ValueError(f"config: {field} must be name=value, got {option!r}")
            try:
                options[name] = json.loads(value)
            except json.JSONDecodeError:
                options[name] = value
        return options

    @property
    def prunes(self) -> bool:
        return any(value is not None for value in self.schedule.values())

    @property
    def calibration_photos(self) -> int:
        """The number of photos for calibration: none without pruning or with window attention."""
        fits = self.prunes and not self.window and bool(self.pretrained or self.weights)
        return (128 if fits else 0) if self.calibrate is None else self.calibrate

    def changed(self, **values: object) -> "Config":
        """Return a copy with these values; raises ValueError for unknown options and invalid
        values."""
        unknown = sorted(set(values) - set(_HINTS))
        if unknown:
            raise ValueError(
                f"config: unknown option {', '.join(unknown)}; options are {', '.join(_HINTS)}"
            )
        return dataclasses.replace(self, **values)  # type: ignore[arg-type]

    def differences(self, other: "Config") -> list[str]:
        """List the options in which two runs differ, as 'name: this value, not the other'."""
        differing = [
            name
            for name in _HINTS
            if name not in _FREE and getattr(self, name) != getattr(other, name)
        ]
        return [
            f"{name}: {getattr(self, name)!r}, not {getattr(other, name)!r}" for name in differing
        ]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @staticmethod
    def read(path: str | Path) -> "Config":
        """Read config.json; raises ValueError, with the path, if it is not a valid
        configuration."""
        return Config.parse(Path(path).read_bytes(), path)

    @staticmethod
    def parse(text: str | bytes, path: str | Path) -> "Config":
        """Parse the text of `to_json`; raises the errors of `read`."""
        try:
            values = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object of options")
        restore = values.get("restore")
        if isinstance(restore, str) and restore in SAVED_RESTORE:
            values["restore"] = SAVED_RESTORE[restore]
        try:
            return Config().changed(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    ">= 1": (
        lambda x: x >= 1,
        "num_queries epochs batch_size accumulate save_steps log_steps eval_epochs max_bad_steps",
    ),
    ">= 0": (
        lambda x: x >= 0,
        "head_lr_scale query_lr_scale last_block_lr_scale lr warmup_epochs weight_decay clip_grad "
        "workers mixup cutmix",
    ),
    "in [0, 1]": (lambda x: 0 <= x <= 1, "curriculum flip erasing"),
    "in [0, 1)": (lambda x: 0 <= x < 1, "ema smoothing drop_path"),
    "in (0, 1]": (lambda x: 0 < x <= 1, "layer_decay"),
}
_HINTS: dict[str, Any] = typing.get_type_hints(Config)
_FREE = {"data", "device", "workers", "save_steps", "log_steps"}  # may change when a run is resumed


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Convert a value to the type of its field: JSON has no tuples, the command line only text."""
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if origin is types.UnionType:  # with None, which is last
        return None if value in (None, "none", "null") else _coerce(name, value, inner[0])
    if origin is Literal:
        if value not in inner:
            raise ValueError(
                f"config: {name} must be one of {', '.join(map(repr, inner))}, got {value!r}"
            )
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or (
            inner[-1] is not ... and len(items) != len(inner)
        ):
            count = "several" if inner[-1] is ... else str(len(inner))
            raise ValueError(f"config: {name} must be {count} values, got {value!r}")
        return tuple(_coerce(name, item, inner[0]) for item in items if item != "")
    if type(value) is hint and hint is not float:
        return value
    if hint is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    try:
        if hint is bool or isinstance(value, bool) or (hint is int and isinstance(value, float)):
            raise TypeError
        if hint is float and not math.isfinite(float(value)):
            raise ValueError
        return hint(value)
    except (TypeError, ValueError, OverflowError):
        expected = "a finite number" if hint is float else hint.__name__
        raise ValueError(f"config: {name} must be {expected}, got {value!r}") from None


# Published recipes, each a config.json.
PRESETS = {
    file.stem: Config.read(file)
    for file in sorted((Path(__file__).parent / "presets").glob("*.json"))
}
