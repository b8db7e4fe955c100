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
    image_features,
    select_features,
    total_rows,
)
from .pooled import pooled_side
from .prompts import KeptColumns, placeholder_runs, shorten_tensors, split_at_both
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
    """Compute the image features, choose among them, and drop the placeholders of the others.

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
    start = 0 if record is None else record.num_columns
    placeholders = input_ids[:, start:] == model.config.image_token_id
    encoded = {name: value for name, value in inputs.items() if name != "pixel_values"}
    kept: Tensor | None = None
    output: Any = None
    if inputs.get("pixel_values") is not None:
        output, sizes = _features(model, tokens, inputs)
        kept = _kept_rows(tokens, placeholders, entries_of(output.pooler_output), sizes)
        encoded["mm_encoder_outputs"] = {"image": output}
        if bool(kept.all()) and record is None:
            return encoded, None
    if positions is None:
        positions = positions_of(model, encoded)
    mask = torch.ones_like(placeholders)
    if kept is not None:
        mask[placeholders] = kept.to(mask.device)
        encoded["mm_encoder_outputs"] = {"image": select_features(output, kept)}
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
    tokens: ImageTokens, placeholders: Tensor, entries: list[Tensor], sizes: Tensor | None
) -> Tensor:
    """Choose rows of image features, of those whose sizes are above 0: (total rows,) bool.

    Raises:
        ValueError: there are more or fewer placeholders than rows.
    """
    lengths = image_runs(placeholders, entries)
    rows = torch.cat(entries)
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
    model: VisionLanguageModel, tokens: ImageTokens, inputs: Mapping[str, object]
) -> tuple[Any, Tensor | None]:
    """Compute image features, and the size of each row, 0 if the tower has pruned it; None: all
    have 1."""

    def call() -> Any:
        return image_features(model.base_model, inputs)

    if tokens.tower is not None:
        return tokens.tower.features(call)
    dense = tokens.dense
    if dense is None or (dense.fuses and tokens.keep != 1.0):
        return call(), None
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


def image_runs(placeholders: Tensor, entries: list[Tensor]) -> list[int]:
    """Lengths of the images in a prompt: runs of placeholders within the features of one entry.

    Raises:
        ValueError: there are more or fewer placeholders (B, L) bool than rows of features.
    """
    count = int(placeholders.sum())
    if total_rows(entries) != count:
        raise ValueError(
            f"cropr: the prompt has {count} image placeholders, the images have "
            f"{total_rows(entries)} tokens; they must be equally many (videos are not pruned)"
        )
    return split_at_both(placeholder_runs(placeholders), [len(entry) for entry in entries])


def _pad_token(model: VisionLanguageModel) -> int:
    """An id for padding that is no placeholder."""
    config = model.config
    text_config = config.get_text_config()
    for value in (getattr(text_config, "pad_token_id", None), 0, 1):
        if isinstance(value, int) and value >= 0 and value != config.image_token_id:
            return value
    raise AssertionError  # 0 and 1 are not both the placeholder


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
