"""Images of different sizes in one batch, without padding."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.adapters import ModelSpec
from ..models.rotary import Rotary
from .budget import Budget, ThresholdBudget
from .engine import below_autograd, run_engine
from .merging import Merge
from .model import CroprModules, require_pruned, run
from .ragged import ActiveRows, RaggedBatch, run_ragged
from .state import PruningOptions, PruningState


class _BlocksReached(Exception):
    """The model has embedded an image."""


class _Embedded(NamedTuple):
    """An image that is about to enter the first block."""

    state: PruningState
    x: Tensor  # (1, N, D)
    rotary: Rotary | None


class _Image(NamedTuple):
    """An image, or its patches."""

    run: Callable[[], object]  # the model on it
    grid: tuple[int, int]  # patches in height and width
    label: str


class BlocksExchange:
    """Takes the tokens of an image that enter the first block, or returns those after the last."""

    def __init__(self, grid: tuple[int, int], tokens: Tensor | None = None):
        self.grid = grid
        self.tokens = tokens  # (1, N, D) or (1, P, D), after the last block
        self.embedded: _Embedded | None = None

    def __call__(self, state: PruningState, x: Tensor, rotary: Rotary | None) -> Tensor:
        """Return the tokens; raises _BlocksReached if it has none."""
        if self.tokens is None:
            state.note_grid(self.grid)
            self.embedded = _Embedded(state, x, None if rotary is None else rotary.for_one_image())
            raise _BlocksReached
        state.done = True
        return self.tokens


@torch.no_grad()
def forward_images(
    model: nn.Module, images: Sequence[Tensor] | Mapping[str, Tensor], **kwargs: object
) -> list[object]:
    """Run images of different sizes as one batch, without padding: blocks see their tokens packed.

    Outputs are those of images one by one, to rounding. Tokens that cost less than the thresholds
    merge, after a block at most 4 R of an image and half of them. Without thresholds at its rate
    the schedule counts the tokens of each image, and those of one size run together.

    Args:
        model: from `deploy`.
        images: (C, H, W) each, of sizes that the model takes. NaFlexVit and SigLIP 2 also take
            their padded inputs: patches (B, N, P), patch_coord (B, N, 2), patch_valid (B, N); or
            pixel_values, spatial_shapes (B, 2), pixel_attention_mask.
        kwargs: further arguments of the model.

    Returns:
        The model's outputs, one an image, of a batch of one. No gradient.

    Raises:
        TypeError: the model is not pruned.
        ValueError: the engine does not run it, patches are of other names or shapes, or the
            schedule does not fit an image.
    """
    modules = require_pruned(model, "cropr.forward_images")
    if modules.engine is None:
        raise ValueError(
            "cropr.forward_images: only the engine packs images, and it is off: "
            f"{modules.engine_reason}"
        )

    def forward(image: _Image, exchange: BlocksExchange) -> object:
        options = PruningOptions(engine=True, full=modules.spec.returns_tokens, exchange=exchange)
        return run(model, image.run, options)[0]

    batch = _images_of(modules.spec, images, kwargs)
    embedded: list[_Embedded] = []
    for image in batch:
        exchange = BlocksExchange(image.grid)
        with suppress(_BlocksReached):
            forward(image, exchange)
        if exchange.embedded is None:
            raise ValueError(
                f"cropr.forward_images: the engine does not run an image of {image.label}"
            )
        embedded.append(exchange.embedded)
    tokens = _run_blocks(modules, embedded)
    return [forward(image, BlocksExchange(image.grid, rows)) for image, rows in zip(batch, tokens)]


def _images_of(
    spec: ModelSpec, images: Sequence[Tensor] | Mapping[str, Tensor], kwargs: Mapping[str, object]
) -> list[_Image]:
    """The images of a list, or of a padded batch of patches."""
    if not isinstance(images, Mapping):
        return [
            _Image(
                partial(spec.run, image.unsqueeze(0), **kwargs),
                spec.grid_of((image.shape[-2], image.shape[-1])),
                str(tuple(image.shape)),
            )
            for image in images
        ]
    if spec.patch_inputs is None:
        raise ValueError(
            f"cropr.forward_images: {type(spec.tower).__name__} takes a list of images (C, H, W), "
            f"got a mapping of {', '.join(images)}"
        )
    return [
        _Image(
            partial(spec.patch_inputs.run, spec.tower, **image.inputs, **kwargs),
            image.grid,
            f"{image.grid[0]} x {image.grid[1]} patches",
        )
        for image in spec.patch_inputs.split(images)
    ]


def _run_blocks(modules: CroprModules, images: Sequence[_Embedded]) -> list[Tensor]:
    """Run images through all blocks, and return the tokens of each, (1, K, D)."""
    if not images:
        return []
    blocks = modules.engine or []
    budget = _budget_of(modules)
    if budget is not None and all(parts.packs for parts in blocks):
        state = max(images, key=lambda part: part.x.shape[1]).state
        if not budget.rate:
            state.counts = []
        with below_autograd():
            merge = modules.config.merge or Merge()
            tokens = run_ragged(state, blocks, _pack(images), merge, budget)
        return [rows[None, : part.x.shape[1]] for part, rows in zip(images, tokens)]
    groups: dict[object, list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault((image.x.shape[1], image.state.grid), []).append(index)
    outputs: dict[int, Tensor] = {}
    for indices in groups.values():
        first = images[indices[0]]
        x = torch.cat([images[index].x for index in indices])
        options = PruningOptions(engine=True, full=modules.spec.returns_tokens)
        state = PruningState(modules, x, options, first.state.grid, first.state.frames)
        outputs |= zip(indices, run_engine(state, x, first.rotary).split(1))
    return [outputs[index] for index in range(len(images))]


def _budget_of(modules: CroprModules) -> Budget | None:
    """The budget of images of any size; None where equally large ones have equal counts."""
    schedule = modules.config.schedule
    rate = None if schedule.rate is None else schedule.share * schedule.rate
    if rate == 0:
        return ThresholdBudget(0, [0.0] * modules.num_used)
    thresholds = None if modules.config.merge is None else modules.thresholds
    if thresholds is None or rate is None or thresholds.num_modules < modules.num_used:
        return None
    return thresholds.at(rate)


def _pack(images: Sequence[_Embedded]) -> RaggedBatch:
    """Put the tokens of images in one buffer (B, N, D), each from its first row on."""
    counts = [part.x.shape[1] for part in images]
    longest = max(counts)

    def padded(values: Tensor, dim: int = 0) -> Tensor:
        shape = [0, 0] * (values.ndim - 1 - dim) + [0, longest - values.shape[dim]]
        return F.pad(values, shape)

    x = torch.cat([padded(part.x, 1) for part in images])
    lengths = torch.tensor(counts)
    rows = torch.cat([torch.arange(n) + b * longest for b, n in enumerate(counts)])
    starts = F.pad(lengths.cumsum(0), (1, 0))
    sizes = torch.ones(len(rows))
    active = ActiveRows(rows.to(x.device), starts.to(x.device), longest, sizes.to(x.device))
    colors = [part.state.choose_priorities(part.x, None) for part in images]
    first, second = (
        None if parts[0] is None else torch.cat([padded(part, 1) for part in parts])
        for parts in zip(*colors)
    )
    rotary = images[0].rotary
    if rotary is not None:
        tables = [part.rotary.with_prefix().table for part in images if part.rotary is not None]
        if isinstance(rotary.table, tuple):
            table: object = tuple(torch.cat([*map(padded, half)]) for half in zip(*tables))
        else:
            table = torch.cat([*map(padded, tables)])
        rotary = Rotary(table, None, 0)
    return RaggedBatch(x, active, (first, second), None, rotary)
