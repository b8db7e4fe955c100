"""Queries for image tokens in closed form, without labels and without training."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration import ranks, solve_ridge
from ..importance import AttentionInput, AttentionInputs
from .answers import hand_over
from .features import VisionLanguageModel, entries_of
from .modalities import Modality, modalities_of, placeholders_of, runs_of, visual_features
from .shortening import accepted
from .tokens import ImageTokens, require_image_tokens
from .towers import GroupTower

Model = TypeVar("Model", bound=nn.Module)
_CALLER = "cropr.calibrate_image_tokens"


class Regression:
    """Normal equations of one query."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None  # (D, D) float64
        self.moment: Tensor | None = None  # (D,)

    def add(self, rows: Tensor, target: Tensor) -> None:
        """Add the tokens rows (N, D) of an image, whose targets (N,) count by their ranks."""
        rows = rows.double()
        rows = rows - rows.mean(0)
        gram = rows.T @ rows
        moment = rows.T @ ranks(target.unsqueeze(0))[0]
        self.gram = gram if self.gram is None else self.gram + gram
        self.moment = moment if self.moment is None else self.moment + moment

    def solve(self, layer: int, ridge: float) -> Tensor:
        """The query (D,), float32, of norm 1."""
        if self.gram is None or self.moment is None:
            raise ValueError(f"{_CALLER}: needs at least one image, with text after it, got none")
        return F.normalize(solve_ridge(layer, self.gram, self.moment, ridge), dim=0).float()


@torch.no_grad()
def calibrate_image_tokens(
    model: Model, batches: Iterable[Mapping[str, Any]], *, ridge: float = 1e-2
) -> Model:
    """Set the queries for image tokens in closed form, from prompts with images and no answers.

    Ridge regression: behind the tower from features to the attention of the text after an image;
    inside from groups to the attention of later blocks.

    Args:
        model: after `prune_image_tokens`.
        batches: inputs of the model.
        ridge: as in `calibrate`.

    Returns:
        The same model.

    Raises:
        TypeError: image tokens are not pruned.
        ValueError: no image has text after it, ridge is not positive, or attention is not seen
            (sdpa and eager are).
    """
    tokens = require_image_tokens(model, _CALLER)
    if not ridge > 0:
        raise ValueError(f"{_CALLER}: ridge must be positive, got {ridge}")
    behind = Regression()
    inside = [Regression() for _ in range(0 if tokens.tower is None else tokens.tower.depth - 1)]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            _add(model, tokens, dict(batch), behind, inside)
    finally:
        model.train(was_training)
    query = behind.solve(len(inside), ridge)
    if tokens.tower is not None:
        queries = [regression.solve(layer, ridge) for layer, regression in enumerate(inside)]
        tokens.tower.queries = torch.stack(queries)
    tokens.query = query
    return model


def _add(
    model: VisionLanguageModel,
    tokens: ImageTokens,
    batch: dict[str, Any],
    behind: Regression,
    inside: list[Regression],
) -> None:
    """Add the images, and frames of videos, of a batch to all regressions."""
    modalities = modalities_of(batch)
    outputs: dict[str, Any] = {}
    for modality in modalities:
        if tokens.tower is None:
            outputs[modality.name] = visual_features(model.base_model, batch, modality)
        else:
            outputs[modality.name] = _observe_tower(model, tokens.tower, batch, modality, inside)
    if not outputs:
        return
    input_ids: Tensor = batch["input_ids"]
    masks = [placeholders_of(model, input_ids, modality) for modality in modalities]
    visual = torch.stack(masks).any(0)
    mask = batch.get("attention_mask")
    text = ~visual if mask is None else ~visual & mask.bool()
    pixels = [modality.pixels for modality in modalities]
    inputs = {name: value for name, value in batch.items() if name not in pixels}
    with AttentionInputs() as attention:
        encoded = inputs | {"mm_encoder_outputs": dict(outputs), "use_cache": False}
        encoded = hand_over(model, tokens, batch, encoded)
        model.base_model.forward(**accepted(model.base_model, encoded))
        tokens.probe.outputs = None
    if not attention.inputs:
        raise ValueError(
            f"{_CALLER}: the language model's attention must be scaled_dot_product_attention or "
            'a softmax: attn_implementation="sdpa" or "eager"'
        )
    for modality, placeholders in zip(modalities, masks):
        entries = entries_of(outputs[modality.name].pooler_output)
        rows = torch.cat(entries)
        places = placeholders.nonzero()
        start = 0
        for length in runs_of(modality, placeholders, entries, batch):
            sample = int(places[start, 0])
            columns = places[start : start + length, 1]
            asking = text[sample].nonzero().squeeze(1)
            asking = asking[asking > columns[-1]]
            if len(asking) and length > 1:
                layers = [_attention_to(part, sample, asking)[columns] for part in attention.inputs]
                behind.add(rows[start : start + length], torch.stack(layers).mean(0))
            start += length


def _attention_to(attention: AttentionInput | Tensor, sample: int, asking: Tensor) -> Tensor:
    """The attention of the columns `asking` to all columns of a sample, mean over heads: (L,)."""
    if isinstance(attention, Tensor):
        return attention[sample][:, asking].float().softmax(-1).mean((0, 1))
    query = attention.query[sample][:, asking].float()
    scale = query.shape[-1] ** -0.5 if attention.scale is None else attention.scale
    logits = query @ attention.key[sample].float().transpose(-2, -1) * scale
    if attention.bias is not None:
        bias = attention.bias[sample if len(attention.bias) > 1 else 0].float()
        logits = logits + (bias if bias.shape[1] == 1 else bias[:, asking])
    return logits.softmax(-1).mean((0, 1))


def _observe_tower(
    model: VisionLanguageModel,
    tower: GroupTower,
    batch: dict[str, Any],
    modality: Modality,
    inside: list[Regression],
) -> Any:
    """Run the unpruned tower; add its groups, and what later blocks look at, to `inside`."""
    groups: list[Tensor] = []
    attended: list[Tensor] = []
    with AttentionInputs() as attention:

        def observe(layer: int, output: Tensor) -> None:
            rows = tower.observed_rows(output)
            groups.append(rows.unflatten(0, (-1, tower.group)).double().mean(1))
            weights = tower.attention_to_rows(attention.inputs)
            if len(weights) != len(rows):
                raise ValueError(
                    f"{_CALLER}: block {layer} must attend over its {len(rows)} rows, attended "
                    f"over {len(weights)}"
                )
            attended.append(weights.unflatten(0, (-1, tower.group)).mean(1))
            attention.inputs.clear()

        with tower.observing(observe) as num_groups:
            output = visual_features(model.base_model, batch, modality)
    for layer, regression in enumerate(inside):
        target = torch.stack(attended[layer + 1 :]).mean(0)
        for rows, values in zip(groups[layer].split(num_groups), target.split(num_groups)):
            regression.add(rows, values)
    return output
