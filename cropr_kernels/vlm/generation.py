"""Forwards and `generate` of a model whose prompts are shortened."""

import copy
import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .answers import hand_over, repeat_answers, takes_features
from .features import VisionLanguageModel
from .modalities import modalities_of
from .shortening import CACHES, cache_of, positions_of, record_of, shorten
from .tokens import ATTRIBUTE, CALLER, require_image_tokens


def before_forward(
    model: VisionLanguageModel, args: tuple[object, ...], kwargs: dict[str, Any]
) -> tuple[tuple[object, ...], dict[str, Any]] | None:
    """Shorten the prompt of a forward with images, and place the tokens that follow on it."""
    tokens = require_image_tokens(model, CALLER)
    tokens.probe.columns = None
    inputs: dict[str, Any] = dict(zip(inspect.signature(model.forward).parameters, args)) | kwargs
    if tokens.probe.generates:
        repeat_answers(model, tokens, len(inputs["input_ids"]))
    elif modalities_of(inputs):
        if cache_of(inputs) is not None and cache_of(inputs).get_seq_length() > 0:
            raise ValueError(
                "cropr: a forward with images needs an empty cache, got one of "
                f"{cache_of(inputs).get_seq_length()} tokens; generate goes on from it"
            )
        mask = inputs.get("attention_mask")
        pad_left = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, 0] == 0).any())
        shortened, tokens.probe.columns = shorten(model, inputs, None, pad_left)
        return (), hand_over(model, tokens, inputs, shortened)
    if inputs.get("position_ids") is None and record_of(inputs) is not None:
        return (), _continued(model, inputs)
    if (
        (inputs.get("mm_encoder_outputs") or modalities_of(inputs))
        and inputs.get("position_ids") is not None
        and inputs.get("attention_mask") is None
        and cache_of(inputs) is None
    ):  # generate(use_cache=False) leaves out a mask of ones: see `_shorten`
        return (), inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
    return None


def after_forward(model: VisionLanguageModel, args: object, kwargs: object, output: Any) -> None:
    """Note in the cache which columns of the prompt it holds."""
    tokens = require_image_tokens(model, CALLER)
    columns = tokens.probe.columns
    if not tokens.probe.generates:
        tokens.probe.outputs = None
    cache = next((getattr(output, name, None) for name in CACHES if hasattr(output, name)), None)
    if columns is not None and cache is not None:
        setattr(cache, ATTRIBUTE, columns)


def _continued(model: VisionLanguageModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Add positions of the full prompt to inputs that follow on a cache of a shortened one."""
    record = record_of(inputs)
    input_ids: Tensor | None = inputs.get("input_ids")
    if record is None or input_ids is None:
        raise ValueError(
            "cropr: a model with pruned image tokens goes on with input_ids (B, L), got "
            f"{', '.join(sorted(inputs))}"
        )
    count = input_ids.shape[1]
    num_cached = int(cache_of(inputs).get_seq_length())
    after = num_cached - record.index.shape[1]  # columns since the prompt
    columns = record.extended(after + count)
    mask: Tensor | None = inputs.get("attention_mask")
    deltas: Tensor | None = getattr(model.base_model, "rope_deltas", None)
    if mask is not None and mask.shape[1] == columns.num_columns and deltas is not None:
        positions = (mask.long().cumsum(1) - 1)[:, -count:] + deltas.to(mask.device)
        positions = positions.expand(3, -1, -1)
    else:
        plain = {name: value for name, value in inputs.items() if name != "attention_mask"}
        positions = positions_of(model, plain)
        positions = positions + (record.num_columns - record.index.shape[1])
    if mask is None:
        mask = columns.index >= 0
    elif mask.shape[1] == columns.num_columns:
        mask = columns.take(mask, 0)
    return inputs | {"position_ids": positions, "attention_mask": mask}


@torch.no_grad()
def generate(
    model: VisionLanguageModel, inputs: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Generate as the model's class does, after a shortened prompt; the result has the full one."""
    base_generate = partial(type(model).generate, model)  # type: ignore[attr-defined]
    if inputs is not None:
        kwargs["input_ids"] = inputs
    if not modalities_of(kwargs) and record_of(kwargs) is None:
        return base_generate(None, *args, **kwargs)
    full_ids = kwargs.get("input_ids")
    if args or not isinstance(full_ids, Tensor):
        raise ValueError(
            "cropr: generate with images takes input_ids, and all others by name, got "
            f"{len(args)} more without a name and {', '.join(sorted(kwargs))}"
        )
    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = _inferred_mask(model, full_ids)
    positions = kwargs.get("position_ids")
    if positions is None:
        named = {name: value for name, value in kwargs.items() if name != "input_ids"}
        positions = model._prepare_position_ids_for_generation(full_ids, named)
    shortened, columns = shorten(model, kwargs, positions, pad_left=True)
    tokens = require_image_tokens(model, CALLER)
    if columns is not None:
        _shift_lengths(shortened, columns.num_columns - columns.index.shape[1])
    tokens.probe.generates = not takes_features(model)
    try:
        output = base_generate(**hand_over(model, tokens, kwargs, shortened))
    finally:
        tokens.probe.generates = False
        tokens.probe.outputs = None
    if columns is None:
        return output
    sequences = output if isinstance(output, Tensor) else output.sequences
    answers = sequences[:, columns.index.shape[1] :]
    times = len(sequences) // len(full_ids)
    prompts = full_ids.repeat_interleave(times, 0).to(sequences.device)
    sequences = torch.cat([prompts, answers], 1)
    for cache in (cache_of(kwargs), *(getattr(output, name, None) for name in CACHES)):
        if cache is not None and times == 1:
            setattr(cache, ATTRIBUTE, columns)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


def _shift_lengths(inputs: dict[str, Any], dropped: int) -> None:
    """Make total lengths that a caller gave those of the shortened prompt."""
    config = inputs.get("generation_config")
    if config is not None:
        inputs["generation_config"] = config = copy.deepcopy(config)
    for name in ("max_length", "min_length"):
        if inputs.get(name):
            inputs[name] -= dropped
        if config is not None and getattr(config, name, None):
            setattr(config, name, getattr(config, name) - dropped)


def _inferred_mask(model: VisionLanguageModel, input_ids: Tensor) -> Tensor:
    """The attention mask that generate would infer: padding is an id that ends nothing."""
    config = model.generation_config
    pad = config.pad_token_id
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if pad is None or pad in ends:
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()
