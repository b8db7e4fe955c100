"""Comparison of a pruned model with the unpruned one, photo by photo: all that the page shows."""

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import calibration
from ..models.outputs import outputs_of
from ..models.pixels import Pixels
from ..pruning.deployment import deployed_copy
from ..pruning.maps import counts_by_block, token_maps
from ..pruning.merging import Merge
from ..pruning.model import modules_of, require_pruned, run
from ..pruning.state import PruningOptions
from ..schedule import Schedule
from ..utils.flops import flop_counter
from ..utils.timing import fitting, seconds_of
from .colors import ColorScale

BATCH = 8  # photos at a time in calibration
_SECONDS = 1.0  # of a measurement of time


class Setting(NamedTuple):
    """The choice of a viewer: a rate and merging, or the schedule of the model."""

    rate: int | None  # None: the schedule that the model was loaded with
    merge: bool = True
    # Of tokens of each photo; else a photo that merges keeps as many as it needs, if the model is
    # calibrated and the engine runs it
    equal_counts: bool = False


class Comparison(NamedTuple):
    """A photo at one setting, and unpruned."""

    pruned: Tensor  # (C,) logits or features, float32
    unpruned: Tensor
    pruned_colors: Tensor | None  # (patches, 3), of the features of a model without classifier
    unpruned_colors: Tensor | None
    # Norm of the difference of the features over the norm of the unpruned ones
    feature_error: float | None
    # (blocks + 1, grid height, grid width): before the first and after each block, the token that
    # holds each patch; -1 if it was dropped
    token_maps: Tensor
    tokens: list[int]  # that enter each block
    agreement: float  # 1 if the best class is the same, else 0; of features the cosine
    divergence: float  # KL divergence from the unpruned probabilities; NaN for features


class Cost(NamedTuple):
    """FLOPs and time of a forward of one photo at a setting, and unpruned, with the tokens that
    photos keep on average."""

    flops: list[int]  # of each block; the first also has the embedding's, the last the head's
    unpruned_flops: list[int]
    ms: float  # median of the rounds
    unpruned_ms: float
    rounds: int

    @property
    def flop_ratio(self) -> float:
        """Times fewer FLOPs than unpruned."""
        return sum(self.unpruned_flops) / sum(self.flops)


class Calibrated(NamedTuple):
    """The photos that a viewer calibrated on, and how well half of them served the others."""

    num_photos: int
    num_fit: int  # photos of the half
    agreement: float  # mean over the others, as in `Comparison`; NaN without others
    rate: int


@dataclass
class Photo:
    """A photo as the model takes it, and its comparisons so far, which live as long as it does."""

    name: str
    pixels: Tensor  # (C, H, W) in [0, 1], C = 1 or 3
    comparisons: dict[Setting, Comparison] = field(default_factory=dict)
    unpruned: "Forward | None" = None
    scale: ColorScale | None = None
    address: str | None = None  # of its picture, once it is drawn


class Forward(NamedTuple):
    """The result of a forward of one photo."""

    output: Tensor
    features: Tensor | None
    token_maps: Tensor
    tokens: list[int]


class Viewer:
    """A model whose pruning is looked at. Methods may be called from any thread.

    Args:
        model: pruned by `apply`; it is copied.
        pixels: the preparation of its images.
        class_names: of its classes, in order; None: they have numbers only.
        device, dtype: of the copy; default those of the model.

    Raises:
        TypeError: the model is not pruned.
        ValueError: it has windows, takes videos, or its patches have no place in the image.
    """

    def __init__(
        self,
        model: nn.Module,
        pixels: Pixels,
        class_names: Sequence[str] | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        modules = require_pruned(model, "cropr view")
        refusal = modules.spec.refusal
        if modules.config.windows is not None or modules.spec.map_blocks is not None:
            refusal = "it has window attention"
        elif modules.spec.frames != 1:
            refusal = f"it takes videos of {modules.spec.frames} frames"
        if refusal is not None:
            raise ValueError(f"cropr view: this model cannot be shown: {refusal}")
        self.model = deployed_copy(model).to(device, dtype)
        self.modules = modules_of(self.model)
        self.config = self.modules.config
        self.pixels = pixels
        self.class_names = class_names
        self.lock = threading.Lock()  # of a forward
        self.measuring = threading.Lock()
        self.calibrated: Calibrated | None = None
        self._results: dict[Setting, Cost] = {}

    @property
    def classifies(self) -> bool:
        """The model has a classifier; else its output is features."""
        return self.modules.spec.num_classes > 0

    @property
    def depth(self) -> int:
        return len(self.modules.spec.blocks)

    @property
    def has_schedule(self) -> bool:
        """The model was loaded with another schedule than a rate."""
        return self.config.schedule.rate is None

    @property
    def highest_rate(self) -> int:
        prefix = self.modules.spec.num_prefix
        patches = self.config.grid[0] * self.config.grid[1]
        return (patches - 1 - prefix % 4) // self.modules.num_used

    @property
    def default(self) -> Setting:
        """The schedule and the merging that the model was loaded with."""
        rate = self.config.schedule.rate
        return Setting(
            None if rate is None else min(rate, self.highest_rate), self.config.merge is not None
        )

    def class_name(self, index: int) -> str:
        return f"class {index}" if self.class_names is None else self.class_names[index]

    def calibrate(
        self, photos: Sequence[Tensor], report: Callable[[int, int], None] | None = None
    ) -> Calibrated:
        """Calibrate on photos (C, H, W) in [0, 1]; before, on half of them, to compare the others.

        Calls report(steps done, all steps). A second call returns the result of the first.

        Raises:
            ValueError: there are no photos, or `cropr.calibrate` refuses the model.
        """
        if not photos:
            raise ValueError("cropr view: calibration needs photos, got none")
        with self.lock:
            if self.calibrated is None:
                self.calibrated = self._calibrate(photos, report or (lambda done, steps: None))
            return self.calibrated

    def _calibrate(
        self, photos: Sequence[Tensor], report: Callable[[int, int], None]
    ) -> Calibrated:
        fit = photos[::2]
        others = photos[1::2]
        steps = len(fit) + len(others) + len(photos)
        done = 0
        device, dtype = self._device_and_dtype()

        def batches(subset: Sequence[Tensor]) -> Iterator[Tensor]:
            nonlocal done
            for first in range(0, len(subset), BATCH):
                batch = self.pixels.normalize(torch.stack([*subset[first : first + BATCH]]))
                yield batch.to(device, dtype)
                done += min(BATCH, len(subset) - first)
                report(done, steps)

        rate = self.default.rate
        rate = min(8, self.highest_rate) if rate is None else rate
        agreement = float("nan")
        if others:
            calibration.calibrate(self.model, batches(fit))
            [row] = calibration.agreement(self.model, batches(others), [rate])
            agreement = row.agreement
        calibration.calibrate(self.model, batches(photos))
        self.config = replace(self.config, llf=self.modules.config.llf)
        return Calibrated(len(photos), len(fit), agreement, rate)

    def compare(self, photo: Photo, setting: Setting) -> Comparison:
        """Compare the pruned with the unpruned model on a photo; the model runs once a setting.

        Raises:
            ValueError: the rate is too high.
        """
        with self.lock:
            if setting not in photo.comparisons:
                photo.comparisons[setting] = self._compare(photo, setting)
            return photo.comparisons[setting]

    def _compare(self, photo: Photo, setting: Setting) -> Comparison:
        if photo.unpruned is None:
            photo.unpruned = self._forward(photo, Setting(0))
        unpruned = photo.unpruned
        pruned = self._forward(photo, setting)
        agreement, divergence = calibration.compare_outputs(
            pruned.output.double().unsqueeze(0),
            unpruned.output.double().unsqueeze(0),
            self.classifies,
        )
        pruned_colors: Tensor | None = None
        unpruned_colors: Tensor | None = None
        error: float | None = None
        if pruned.features is not None and unpruned.features is not None:
            if photo.scale is None:
                photo.scale = ColorScale(unpruned.features)
            pruned_colors = photo.scale.colors(pruned.features)
            unpruned_colors = photo.scale.colors(unpruned.features)
            difference = pruned.features - unpruned.features
            error = (difference.norm() / unpruned.features.norm()).item()
        return Comparison(
            pruned.output,
            unpruned.output,
            pruned_colors,
            unpruned_colors,
            error,
            pruned.token_maps,
            pruned.tokens,
            agreement,
            divergence,
        )

    @torch.inference_mode()
    def _forward(self, photo: Photo, setting: Setting) -> Forward:
        """Run the functional ops, which tell where each token is after each block."""
        self._set(setting)
        spec = self.modules.spec
        features: list[Tensor] = []
        shows_features = not self.classifies and spec.norm is not None
        options = PruningOptions(
            collect=True,
            restore=shows_features,
            engine=True,
            equal_counts=setting.equal_counts,
        )
        image = self.pixels.normalize(photo.pixels.unsqueeze(0)).to(*self._device_and_dtype())
        with ExitStack() as stack:
            if shows_features and spec.norm is not None:
                keep = spec.norm.register_forward_hook(
                    lambda norm, args, output: features.append(output[0])
                )
                stack.callback(keep.remove)
            output, state = run(self.model, lambda: outputs_of(spec.tower(image)), options)
        patches = features[0][spec.num_prefix :].float().cpu() if features else None
        tokens = counts_by_block(state)[0].tolist()
        return Forward(output[0].float().cpu(), patches, token_maps(state)[:, 0].cpu(), tokens)

    def measured(self, setting: Setting) -> Cost | None:
        """The cost of a setting, if `measure` knows it."""
        return self._results.get(setting)

    def measure(self, setting: Setting) -> Cost:
        """Count FLOPs, and time forwards, pruned and unpruned in turns, in about a second; once a
        setting. The engine runs them if it knows the model."""
        with self.measuring:
            if setting not in self._results:
                self._results[setting] = self._measure(setting)
            return self._results[setting]

    def _measure(self, setting: Setting) -> Cost:
        device, dtype = self._device_and_dtype()
        shape = (1, len(self.pixels.mean), *self.pixels.img_size)
        image = torch.zeros(shape, device=device, dtype=dtype)
        unpruned = setting._replace(rate=0)
        flops, unpruned_flops = (self._count(image, each) for each in (setting, unpruned))
        warm_up = sum(self._seconds(image, each) for each in (setting, unpruned))
        rounds = fitting(warm_up, _SECONDS)
        times: list[float] = []
        unpruned_times: list[float] = []
        for _ in range(rounds):
            times.append(self._seconds(image, setting))
            unpruned_times.append(self._seconds(image, unpruned))
        ms, unpruned_ms = (1e3 * statistics.median(series) for series in (times, unpruned_times))
        return Cost(flops, unpruned_flops, ms, unpruned_ms, rounds)

    def _count(self, image: Tensor, setting: Setting) -> list[int]:
        """Count the FLOPs of each block, with all that runs before the next."""
        blocks = self.modules.spec.blocks
        starts: list[int] = []
        with self.lock, torch.inference_mode(), flop_counter() as counter, ExitStack() as stack:
            self._set(setting)
            for block in blocks:
                hook = block.register_forward_pre_hook(
                    lambda block, args: starts.append(counter.get_total_flops())
                )
                stack.callback(hook.remove)
            self._run_blank(image)
        ends = [*starts[1:], counter.get_total_flops()]
        return [end - start for start, end in zip([0, *starts[1:]], ends, strict=True)]

    def _seconds(self, image: Tensor, setting: Setting) -> float:
        """Time one forward; a comparison may come between two."""
        with self.lock, torch.inference_mode():
            self._set(setting)
            return seconds_of(lambda: self._run_blank(image), image.device)

    def _run_blank(self, image: Tensor) -> None:
        """Run a blank image, with the tokens that photos keep on average."""
        run(
            self.model,
            lambda: self.modules.spec.tower(image),
            PruningOptions(engine=True, equal_counts=True),
        )

    def _set(self, setting: Setting) -> None:
        """Prune as a setting says; raises ValueError if the rate is too high."""
        schedule = self.config.schedule if setting.rate is None else Schedule(rate=setting.rate)
        merge = (self.config.merge or Merge()) if setting.merge else None
        self.modules.config = replace(self.config, schedule=schedule, merge=merge)

    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        parameter = next(self.model.parameters())
        return parameter.device, parameter.dtype
