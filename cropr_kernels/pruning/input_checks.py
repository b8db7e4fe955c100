"""Refusal of inputs that a pruned model cannot take."""

from collections.abc import Mapping, Sequence

import torch

from .state import PruningModules, PruningOptions


def refuse_padded_patches(
    modules: PruningModules, args: Sequence[object], kwargs: Mapping[str, object]
) -> None:
    """Raise ValueError if the arguments of a forward are patches with padding (NaFlexViT, SigLIP
    2), which would be scored, kept and merged as patches are, unless nothing is pruned."""
    names = modules.spec.patch_inputs
    schedule = modules.config.schedule
    if names is None or schedule.rate == 0 or not schedule.share or torch.compiler.is_compiling():
        return
    if names.has_padding(args, kwargs):
        raise ValueError(
            f"cropr: a pruned {type(modules.spec.tower).__name__} takes patches without padding, "
            f"or at a rate of 0, got a {names.mask} that is not all true: give the same inputs to "
            "cropr.forward_images"
        )


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
