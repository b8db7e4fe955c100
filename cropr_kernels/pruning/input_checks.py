"""Inputs of a pruned model before its forward: refusal of those it cannot take."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .state import PruningModules, PruningOptions


def take_patches(
    modules: PruningModules, args: Sequence[object], kwargs: Mapping[str, object]
) -> None:
    """Note the grid of the patches (NaFlexViT, SigLIP 2) among the arguments of a forward, if any.

    Raises:
        ValueError: they have padding, which would be scored, kept and merged as patches are, and
            the rate is not 0. Under torch.compile RuntimeError, of an assertion in its graph.
    """
    names = modules.spec.patch_inputs
    schedule = modules.config.schedule
    if names is None or schedule.rate == 0 or not schedule.share:
        return
    inputs = names.find(args, kwargs)
    mask = inputs[names.mask]
    message = (
        f"cropr: a pruned {type(modules.spec.tower).__name__} takes patches without padding, or at "
        f"a rate of 0, got a {names.mask} that is not all true: give the same inputs to "
        "cropr.forward_images"
    )
    if torch.compiler.is_compiling():
        if isinstance(mask, Tensor) and torch.compiler.is_dynamo_compiling():
            torch._assert_async(mask.bool().all(), message)
        return
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise ValueError(message)
    places = inputs[names.places]
    if isinstance(places, Tensor) and len(places):
        modules.context.grid = names.grid_of(places)


def check_masks(modules: PruningModules, name: str, options: PruningOptions) -> None:
    """Raise ValueError if a model of this name cannot take the masks."""
    for mask, option in ((options.protect, "protect"), (options.padding, "padding")):
        if mask is not None and modules.spec.refusal is not None:
            raise ValueError(f"cropr: {option} is not supported for {name}: {modules.spec.refusal}")
    if options.padding is None:
        return
    if modules.config.merge is not None:
        raise ValueError("cropr: padding is not supported with merge=True: drop tokens instead")
    if modules.config.windows is not None or modules.spec.map_blocks is not None:
        raise ValueError("cropr: padding is not supported with window attention")
    if modules.spec.pooling == "other":
        raise ValueError(
            "cropr: padding needs a head that takes the class token or averages over the patches; "
            "that of "
            f"{name} does neither"
        )
