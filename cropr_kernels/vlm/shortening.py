"""A prompt without the placeholders of pruned image tokens: the choice, columns and positions."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .choice import choose, num_kept
from .features import (
    VisionLanguageModel,
    entries_of,
    select_features,
)
from .modalities import IMAGE, Modality, modalities_of, placeholders_of, runs_of, visual_features
from .pooled import pooled_side
from .prompts import KeptColumns, shorten_tensors
from .tokens import ATTRIBUTE, CALLER, ImageTokens, require_image_tokens

# Names of the cache, in transformers of today and before
CACHES = ("cache", "past_key_values")


class _Positions(Exception):
    """Ends a forward where the language model begins, with the positions that it would see."""

    def __init__(self, positions: Tensor | None):
        super().__init__()
        self.positions = positions


def cache_of(inputs: Mapping[str, object]) -> Any:
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)


def record_of(inputs: Mapping[str, object]) -> KeptColumns | None:
    """The columns of earlier turns that are in the cache, if image tokens were pruned there."""
    return getattr(cache_of(inputs), ATTRIBUTE, None)


def accepted(module: Any, inputs: Mapping[str, object]) -> dict[str, object]:
    """The inputs that a module's forward names."""
    names = inspect.signature(module.forward).parameters
    return {name: value for name, value in inputs.items() if name in names}


def shorten(
    model: VisionLanguageModel,
    inputs: Mapping[str, object],
    positions: Tensor | None,
    pad_left: bool,
) -> tuple[dict[str, Any], KeptColumns | None]:
    """Compute features of images and videos, choose among them, and drop the other placeholders.

    Args:
        inputs: of the model, with the full prompt.
        positions: (B, L) or (axes, B, L) of the full prompt; None: those of the model's forward.
        pad_left: where rows are padded of which fewer columns stay.

    Returns:
        Inputs, and the columns that stay; None if all do.
    """
    tokens = require_image_tokens(model, CALLER)
    input_ids = inputs.get("input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        raise ValueError(
            "cropr: a model with pruned image tokens needs input_ids (B, L) beside pixel_values"
        )
    record = record_of(inputs)
    prompt = input_ids if record is None else input_ids[:, record.num_columns :]
    modalities = modalities_of(inputs)
    encoded = {
        name: value
        for name, value in inputs.items()
        if name not in [modality.pixels for modality in modalities]
    }
    outputs: dict[str, Any] = {}
    mask = torch.ones_like(prompt, dtype=torch.bool)
    kept_rows: dict[str, Tensor] = {}
    for modality in modalities:
        placeholders = placeholders_of(model, prompt, modality)
        output, sizes = _features(model, tokens, inputs, modality)
        entries = entries_of(output.pooler_output)
        lengths = runs_of(modality, placeholders, entries, inputs)
        kept = _kept_rows(tokens, lengths, torch.cat(entries), sizes)
        mask[placeholders] = kept.to(mask.device)
        outputs[modality.name] = output
        kept_rows[modality.name] = kept
    if outputs:
        encoded["mm_encoder_outputs"] = outputs
    if bool(mask.all()) and record is None:
        return encoded, None
    if positions is None:
        positions = positions_of(model, encoded)
    if outputs:
        encoded["mm_encoder_outputs"] = {
            name: select_features(output, kept_rows[name]) for name, output in outputs.items()
        }
    columns = KeptColumns.of(mask, pad_left=pad_left)
    columns = columns if record is None else record.then(columns)
    shortened = shorten_tensors(encoded, columns, _pad_token(model))
    if shortened.get("attention_mask") is None:
        # Without a mask, gaps between positions would be taken for packed prompts.
        shortened["attention_mask"] = (columns.index >= 0).long()
    positions = positions.expand(*positions.shape[:-2], len(mask), -1)
    shortened["position_ids"] = columns.take(positions, 0)
    return shortened, columns


def _kept_rows(
    tokens: ImageTokens, lengths: list[int], rows: Tensor, sizes: Tensor | None
) -> Tensor:
    """Choose among rows (total, D) of images or frames of these lengths, of those whose sizes are
    above 0: (total,) bool."""
    if sizes is None:
        sizes = torch.ones(len(rows), device=rows.device)
    kept = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    start = 0
    for length in lengths:
        candidates = start + sizes[start : start + length].nonzero().squeeze(1)
        if len(candidates) == 0:
            raise ValueError("cropr: the tower leaves no token of an image; lower its rate")
        number = min(num_kept(tokens.keep, length), len(candidates))
        chosen = choose(rows[candidates], number, tokens.query, sizes[candidates])
        kept[candidates[chosen]] = True
        start += length
    return kept


def _features(
    model: VisionLanguageModel,
    tokens: ImageTokens,
    inputs: Mapping[str, object],
    modality: Modality,
) -> tuple[Any, Tensor | None]:
    """Compute features, and the size of each row, 0 if the tower has pruned it; None: all
    have 1."""

    def call() -> Any:
        return visual_features(model.base_model, inputs, modality)

    if tokens.tower is not None:
        return tokens.tower.features(call)
    dense = tokens.dense
    if dense is None or (dense.fuses and tokens.keep != 1.0):
        return call(), None
    if modality is not IMAGE:
        raise ValueError(
            f"cropr: {type(model).__name__} pools patches of videos, which its tower prunes "
            "singly; prune it with llf=True, and choose tokens behind it (keep=...)"
        )
    side = pooled_side(model.config)
    if side is None:
        return dense.features(call)
    if tokens.keep == 1.0:
        raise ValueError(
            f"cropr: {type(model).__name__} pools patches, which its tower prunes singly; choose "
            "image tokens behind it (keep=...), or prune groups instead: "
            "cropr.prune_image_tokens(model, tower=...)"
        )
    return dense.pooled_features(call, side)


def _pad_token(model: VisionLanguageModel) -> int:
    """An id for padding that is no placeholder."""
    config = model.config
    text_config = config.get_text_config()
    pad = getattr(text_config, "pad_token_id", None)
    unused = (0, 1) if pad is None else (pad, 0, 1)
    return next(value for value in unused if value >= 0 and value != config.image_token_id)


@torch.no_grad()
def positions_of(model: VisionLanguageModel, inputs: Mapping[str, Any]) -> Tensor:
    """Positions (B, L) or (axes, B, L) that the model's forward would give to these inputs."""
    if inputs.get("position_ids") is not None:
        positions: Tensor = inputs["position_ids"]
        return positions
    probe = require_image_tokens(model, CALLER).probe
    arguments = accepted(model.base_model, inputs)
    probe.active = True
    try:
        model.base_model.forward(**arguments)
    except _Positions as seen:
        if seen.positions is not None:
            return seen.positions
        cache = cache_of(inputs)
        past = 0 if cache is None else int(cache.get_seq_length())
        input_ids: Tensor = inputs["input_ids"]
        return torch.arange(past, past + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    finally:
        probe.active = False
    raise RuntimeError(f"cropr: {type(model).__name__} did not call its language model")


def end_at_decoder(
    tokens: ImageTokens, decoder: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]
) -> None:
    """End a forward that is run for its positions."""
    if tokens.probe.active:
        raise _Positions(kwargs.get("position_ids"))
