"""Features for forwards that take none, those of transformers before 5.18: the model's own
get_image_features and get_video_features return what was chosen before."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .features import VisionLanguageModel, changed, entries_of
from .modalities import MODALITIES, modalities_of
from .tokens import ImageTokens


def takes_features(model: VisionLanguageModel) -> bool:
    """Tell whether a model's forward takes features in place of pixels."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def install_answers(model: VisionLanguageModel, tokens: ImageTokens) -> None:
    """Let the features that a forward computes be those in the probe of `tokens`, if there are."""
    base = model.base_model
    for modality in MODALITIES:
        if hasattr(base, modality.getter):
            setattr(base, modality.getter, partial(_answer, base, tokens, modality))


def remove_answers(model: VisionLanguageModel) -> None:
    """Undo `install_answers`."""
    base = model.base_model
    for modality in MODALITIES:
        vars(base).pop(modality.getter, None)


def hand_over(
    model: VisionLanguageModel,
    tokens: ImageTokens,
    inputs: Mapping[str, Any],
    encoded: dict[str, Any],
) -> dict[str, Any]:
    """Make inputs with features those that a forward of this model takes.

    Args:
        inputs: with pixels.
        encoded: without them, with mm_encoder_outputs.
    """
    outputs = encoded.get("mm_encoder_outputs")
    if outputs is None or takes_features(model):
        return encoded
    tokens.probe.outputs = outputs
    tokens.probe.prompt = encoded["input_ids"]
    pixels = {modality.pixels: inputs[modality.pixels] for modality in modalities_of(inputs)}
    return {name: encoded[name] for name in encoded if name != "mm_encoder_outputs"} | pixels


def repeat_answers(model: VisionLanguageModel, tokens: ImageTokens, num_rows: int) -> None:
    """Repeat the features of each row of the prompt for its beams, of `num_rows` in all."""
    prompt, outputs = tokens.probe.prompt, tokens.probe.outputs
    if prompt is None or outputs is None or len(prompt) == num_rows:
        return
    times = num_rows // len(prompt)
    for modality in MODALITIES:
        if modality.name not in outputs:
            continue
        output = outputs[modality.name]
        counts = (prompt == getattr(model.config, modality.token)).sum(1)
        lengths = [len(entry) for entry in entries_of(output.pooler_output)]
        row = torch.bucketize(torch.tensor(lengths).cumsum(0), counts.cpu().cumsum(0))
        order = [
            index
            for sample in range(len(prompt))
            for _ in range(times)
            for index in (row == sample).nonzero().flatten().tolist()
        ]
        outputs[modality.name] = changed(output, partial(_taken, order=order, lengths=lengths))
    tokens.probe.prompt = prompt.repeat_interleave(times, 0)


def _taken(value: Any, order: list[int], lengths: list[int]) -> Any:
    """Take entries of these lengths in this order from a tensor (entries, N, D) or (rows, D), from
    a sequence of entries, or from sequences of such."""
    if isinstance(value, Tensor):
        if len(value) == len(lengths):
            return value[order]
        if len(value) != sum(lengths):
            return value
        entries = value.split(lengths)
        return torch.cat([entries[index] for index in order])
    if not isinstance(value, tuple | list):
        return value
    if [len(entry) for entry in value] == lengths:
        return [value[index] for index in order]
    return [_taken(entry, order, lengths) for entry in value]


def _answer(
    base: VisionLanguageModel, tokens: ImageTokens, modality: Any, *args: Any, **kwargs: Any
) -> Any:
    outputs = tokens.probe.outputs
    if outputs is None or modality.name not in outputs:
        return getattr(type(base), modality.getter)(base, *args, **kwargs)
    return outputs[modality.name]
