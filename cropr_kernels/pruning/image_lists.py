"""Images of different sizes in one batch, without padding."""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.rotary import Rotary
from .budget import Budget, ThresholdBudget
from .engine import below_autograd
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


class BlocksExchange:
    """Takes the tokens of an image that enter the first block, or returns those after the last."""

    def __init__(self, tokens: Tensor | None = None):
        self.tokens = tokens  # (1, N, D) or (1, P, D), after the last block
        self.embedded: _Embedded | None = None

    def __call__(self, state: PruningState, x: Tensor, rotary: Rotary | None) -> Tensor:
        """Return the tokens; raises _BlocksReached if it has none."""
        if self.tokens is None:
            self.embedded = _Embedded(state, x, rotary)
            raise _BlocksReached
        state.done = True
        return self.tokens


@torch.no_grad()
def forward_images(model: nn.Module, images: Sequence[Tensor], **kwargs: object) -> list[object]:
    """Run images of different sizes as one batch, without padding: blocks see their tokens packed.

    Each image merges the tokens that cost less than the thresholds, as many as it needs; outputs
    are those of images one by one, to rounding. Embedding and head run image by image.

    Args:
        model: from `deploy`, of a rate of 0, or of a calibrated model that merges.
        images: (C, H, W) each, of sizes that the model takes.
        kwargs: further arguments of the model.

    Returns:
        The model's outputs, one an image, of a batch of one. No gradient.

    Raises:
        TypeError: the model is not pruned.
        ValueError: the engine does not run it, or it has no thresholds at its rate.
    """
    modules = require_pruned(model, "cropr.forward_images")
    if modules.engine is None:
        raise ValueError(
            "cropr.forward_images: only the engine packs images, and it is off: "
            f"{modules.engine_reason}"
        )
    budget = _budget_of(modules)

    def forward(image: Tensor, exchange: BlocksExchange) -> object:
        options = PruningOptions(engine=True, full=modules.spec.returns_tokens, exchange=exchange)
        return run(model, lambda: modules.spec.run(image.unsqueeze(0), **kwargs), options)[0]

    embedded: list[_Embedded] = []
    for image in images:
        exchange = BlocksExchange()
        with suppress(_BlocksReached):
            forward(image, exchange)
        if exchange.embedded is None:
            raise ValueError(
                f"cropr.forward_images: the engine does not run an image of {tuple(image.shape)}"
            )
        embedded.append(exchange.embedded)
    if not embedded:
        return []
    state = max(embedded, key=lambda part: part.x.shape[1]).state
    with below_autograd():
        merge = modules.config.merge or Merge()
        tokens = run_ragged(state, modules.engine, _pack(embedded), merge, budget)
    outputs = []
    for image, part, rows in zip(images, embedded, tokens):
        outputs.append(forward(image, BlocksExchange(rows[None, : part.x.shape[1]])))
    return outputs


def _budget_of(modules: CroprModules) -> Budget:
    schedule = modules.config.schedule
    rate = None if schedule.rate is None else schedule.share * schedule.rate
    if rate == 0:
        return ThresholdBudget(0, [0.0] * modules.num_used)
    thresholds = None if modules.config.merge is None else modules.thresholds
    budget = None if thresholds is None or rate is None else thresholds.at(rate)
    if budget is None:
        raise ValueError(
            "cropr.forward_images: images of different sizes need a rate of 0, or merging with "
            f"thresholds (cropr.calibrate) at its rate, got {modules.config}"
        )
    return budget


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
