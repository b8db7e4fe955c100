"""prune_image_tokens: fewer image tokens into the language model of a vision-language model."""

import copy
import inspect
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..schedule import Schedule
from .choice import Keep, checked_keep, choose, num_kept
from .dense import PrunedTower, find_pruned
from .features import (
    VisionLanguageModel,
    entries_of,
    image_features,
    language_model,
    select_features,
    total_rows,
)
from .packed import PackedTower, find_tower
from .prompts import KeptColumns, placeholder_runs, shorten_tensors, split_at_both

Model = TypeVar("Model", bound=nn.Module)
_ATTRIBUTE = "cropr_image_tokens"
_CALLER = "cropr.prune_image_tokens"
# Names of the cache, in transformers of today and before
_CACHES = ("cache", "past_key_values")


class _Positions(Exception):
    """Ends a forward where the language model begins, with the positions that it would see."""

    def __init__(self, positions: Tensor | None):
        super().__init__()
        self.positions = positions


class _Probe(threading.local):
    """Of this thread: whether it asks for positions only, and the columns of its prompt."""

    active = False
    columns: KeptColumns | None = None


class ImageTokens(nn.Module):
    """`model.cropr_image_tokens`: how image tokens are chosen.

    Args:
        keep: tokens an image (or tile) keeps, or their share; 1.0: all that leave the tower.
        query: (D,), D the width of the language model; None: evenly spaced tokens.
        tower: pruning inside the tower, if there is any.
    """

    query: Tensor | None

    def __init__(self, keep: Keep, query: Tensor | None, tower: PackedTower | None = None):
        super().__init__()
        self.keep = keep
        self.tower = tower
        self.dense: PrunedTower | None = None
        self.register_buffer("query", query, persistent=False)
        self.hooks: list[RemovableHandle] = []
        self.probe = _Probe()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "probe": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "probe": _Probe()})

    def extra_repr(self) -> str:
        chosen = "evenly spaced" if self.query is None else "by a query"
        return f"keep={self.keep}, {chosen}"


def prune_image_tokens(
    model: Model, keep: Keep = 1.0, *, query: Tensor | None = None, tower: Schedule | None = None
) -> Model:
    """Let the language model of a vision-language model see fewer image tokens, in place.

    The placeholders of the others leave the prompt, with their columns of masks, labels and token
    types; kept tokens keep their positions. `model(**inputs)`, `generate` and `Trainer` are called
    as before; logits are those of the shortened prompt, `generate` returns the full one.

    Args:
        model: of Hugging Face, with `get_image_features` and `mm_encoder_outputs`.
        keep: int >= 1, tokens an image or tile keeps; float in (0, 1], their share, rounded up.
            1.0: all that leave the tower; of one pruned by `apply` those that it kept.
        query: (D,), D the width of the language model: tokens with the highest product are kept.
            None: evenly spaced ones.
        tower: also prune inside a tower that packs its images: groups of patches that become one
            token, of each image.

    Returns:
        The same model.

    Raises:
        TypeError: the model cannot be pruned so; the message is the reason.
        ValueError: keep is out of range, query has another width, or tokens are pruned already.
    """
    if hasattr(model, _ATTRIBUTE):
        raise ValueError(f"{_CALLER}: image tokens are pruned already; set model.{_ATTRIBUTE}.keep")
    keep = checked_keep(keep)
    _require_supported(model)
    decoder = language_model(model)
    width = _width(model)
    if query is not None and tuple(query.shape) != (width,):
        raise ValueError(f"{_CALLER}: query must be ({width},), got {tuple(query.shape)}")
    packed = None if tower is None else _packed_tower(model, tower)
    tokens = ImageTokens(keep, None if query is None else query.detach().float(), packed)
    pruned = find_pruned(model)
    if pruned is not None:
        tokens.dense = PrunedTower(pruned)
    setattr(model, _ATTRIBUTE, tokens)
    tokens.hooks = [
        model.register_forward_pre_hook(_before_forward, with_kwargs=True),
        model.register_forward_hook(_after_forward, with_kwargs=True),
        decoder.register_forward_pre_hook(partial(_before_decoder, tokens), with_kwargs=True),
    ]
    model.generate = partial(generate, model)  # type: ignore[assignment]
    return model


def restore_image_tokens(model: Model) -> Model:
    """Undo `prune_image_tokens`, in place.

    Raises:
        TypeError: image tokens are not pruned.
    """
    tokens = require_image_tokens(model, "cropr.restore_image_tokens")
    for part in (tokens, tokens.tower, tokens.dense):
        for hook in () if part is None else part.hooks:
            hook.remove()
    delattr(model, _ATTRIBUTE)
    del model.generate
    return model


def num_image_tokens(model: nn.Module, count: int) -> int:
    """Count the tokens that an image or tile of `count` placeholders keeps, before it is seen.

    Raises:
        TypeError: image tokens are not pruned.
    """
    tokens = require_image_tokens(model, "cropr.num_image_tokens")
    kept = num_kept(tokens.keep, count)
    if tokens.tower is not None:
        return min(kept, tokens.tower.num_kept(count))
    return tokens.dense.num_kept(count) if tokens.dense is not None and kept == count else kept


def require_image_tokens(model: nn.Module | VisionLanguageModel, caller: str) -> ImageTokens:
    """Return the choice of a model; raise TypeError, which names the caller, for any other."""
    tokens = getattr(model, _ATTRIBUTE, None)
    if not isinstance(tokens, ImageTokens):
        raise TypeError(
            f"{caller}: image tokens are not pruned; call {_CALLER}(model, keep=...) first"
        )
    return tokens


def _require_supported(model: VisionLanguageModel) -> None:
    """Raise TypeError for a model whose structure does not allow to drop placeholders."""
    reason = ""
    config = getattr(model, "config", None)
    base = getattr(model, "base_model", None)
    if config is None or base is None or not hasattr(model, "generate"):
        reason = "it is no generating model of transformers; give the one with generate()"
    elif base is model or not hasattr(base, "get_image_features"):
        reason = "it has no get_image_features, which would give rows in place of placeholders"
    elif "pixel_values" not in inspect.signature(base.get_image_features).parameters:
        reason = "its images are no pixel_values"
    elif getattr(config, "is_encoder_decoder", False):
        reason = "it has an encoder for its prompt"
    elif getattr(config, "image_token_id", None) is None:
        reason = "its configuration names no image_token_id"
    else:
        names = inspect.signature(model.forward).parameters
        needed = ("mm_encoder_outputs", "position_ids", "attention_mask")
        missing = [name for name in needed if name not in names]
        if missing:
            reason = f"its forward takes no {missing[0]} (transformers 5.18 or newer)"
    if reason:
        raise TypeError(f"{_CALLER}: {type(model).__name__} cannot be pruned: {reason}")


def _packed_tower(model: nn.Module, schedule: Schedule) -> PackedTower:
    tower = find_tower(model)
    if tower is None:
        raise TypeError(
            f"{_CALLER}: tower is for towers that pack their images, and {type(model).__name__} "
            "has none; prune its tower by cropr.apply"
        )
    return PackedTower(tower, schedule)


def _width(model: VisionLanguageModel) -> int:
    return int(model.get_input_embeddings().weight.shape[1])


def _pad_token(model: VisionLanguageModel) -> int:
    """An id for padding that is no placeholder."""
    config = model.config
    text_config = config.get_text_config()
    for value in (getattr(text_config, "pad_token_id", None), 0, 1):
        if isinstance(value, int) and value >= 0 and value != config.image_token_id:
            return value
    raise AssertionError  # 0 and 1 are not both the placeholder


def _kept_rows(
    tokens: ImageTokens, placeholders: Tensor, entries: list[Tensor], present: Tensor | None
) -> Tensor:
    """Choose rows of image features, of those that are present: (total rows,) bool.

    Raises:
        ValueError: there are more or fewer placeholders than rows.
    """
    lengths = image_runs(placeholders, entries)
    rows = torch.cat(entries)
    if present is None:
        present = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    kept = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    start = 0
    for length in lengths:
        candidates = start + present[start : start + length].nonzero().squeeze(1)
        if len(candidates) == 0:
            raise ValueError("cropr: the tower leaves no token of an image; lower its rate")
        number = min(num_kept(tokens.keep, length), len(candidates))
        kept[candidates[choose(rows[candidates], number, tokens.query)]] = True
        start += length
    return kept


def _features(
    model: VisionLanguageModel, tokens: ImageTokens, inputs: Mapping[str, object]
) -> tuple[Any, Tensor | None]:
    """Compute image features, and tell of each row whether the tower has left it; None: all."""

    def call() -> Any:
        return image_features(model.base_model, inputs)

    if tokens.tower is not None:
        return tokens.tower.features(call)
    if tokens.dense is None or tokens.keep != 1.0:
        return call(), None
    output, present, num_patches = tokens.dense.features(call)
    if 2 * len(present) <= num_patches:
        raise ValueError(
            f"cropr: {type(model).__name__} pools patches, which its tower prunes singly; choose "
            "image tokens behind it: cropr.prune_image_tokens(model, keep=...)"
        )
    return output, present


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


def accepted(module: Any, inputs: Mapping[str, object]) -> dict[str, object]:
    """The inputs that a module's forward names."""
    names = inspect.signature(module.forward).parameters
    return {name: value for name, value in inputs.items() if name in names}


def _cache_of(inputs: Mapping[str, object]) -> Any:
    return next((inputs[name] for name in _CACHES if inputs.get(name) is not None), None)


def _record_of(inputs: Mapping[str, object]) -> KeptColumns | None:
    """The columns of earlier turns that are in the cache, if image tokens were pruned there."""
    return getattr(_cache_of(inputs), _ATTRIBUTE, None)


def _shorten(
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
    tokens = require_image_tokens(model, _CALLER)
    input_ids = inputs.get("input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        raise ValueError(
            "cropr: a model with pruned image tokens needs input_ids (B, L) beside pixel_values"
        )
    record = _record_of(inputs)
    start = 0 if record is None else record.num_columns
    placeholders = input_ids[:, start:] == model.config.image_token_id
    encoded = {name: value for name, value in inputs.items() if name != "pixel_values"}
    kept: Tensor | None = None
    output: Any = None
    if inputs.get("pixel_values") is not None:
        output, present = _features(model, tokens, inputs)
        kept = _kept_rows(tokens, placeholders, entries_of(output.pooler_output), present)
        encoded["mm_encoder_outputs"] = {"image": output}
        if bool(kept.all()) and record is None:
            return encoded, None
    if positions is None:
        positions = _positions_of(model, encoded)
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


@torch.no_grad()
def _positions_of(model: VisionLanguageModel, inputs: Mapping[str, Any]) -> Tensor:
    """Positions (B, L) or (axes, B, L) that the model's forward would give to these inputs."""
    if inputs.get("position_ids") is not None:
        positions: Tensor = inputs["position_ids"]
        return positions
    probe = require_image_tokens(model, _CALLER).probe
    arguments = accepted(model.base_model, inputs)
    probe.active = True
    try:
        model.base_model.forward(**arguments)
    except _Positions as seen:
        if seen.positions is not None:
            return seen.positions
        cache = _cache_of(inputs)
        past = 0 if cache is None else int(cache.get_seq_length())
        input_ids: Tensor = inputs["input_ids"]
        return torch.arange(past, past + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    finally:
        probe.active = False
    raise RuntimeError(f"cropr: {type(model).__name__} did not call its language model")


def _before_decoder(
    tokens: ImageTokens, decoder: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]
) -> None:
    """End a forward that is run for its positions."""
    if tokens.probe.active:
        raise _Positions(kwargs.get("position_ids"))


def _before_forward(
    model: VisionLanguageModel, args: tuple[object, ...], kwargs: dict[str, Any]
) -> tuple[tuple[object, ...], dict[str, Any]] | None:
    """Shorten the prompt of a forward with images, and place the tokens that follow on it."""
    tokens = require_image_tokens(model, _CALLER)
    tokens.probe.columns = None
    inputs: dict[str, Any] = dict(zip(inspect.signature(model.forward).parameters, args)) | kwargs
    if inputs.get("pixel_values") is not None:
        if _cache_of(inputs) is not None and _cache_of(inputs).get_seq_length() > 0:
            raise ValueError("cropr: a forward with images goes on from a cache only in generate")
        mask = inputs.get("attention_mask")
        pad_left = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, 0] == 0).any())
        shortened, tokens.probe.columns = _shorten(model, inputs, None, pad_left)
        return (), shortened
    if inputs.get("position_ids") is None and _record_of(inputs) is not None:
        return (), _continued(model, inputs)
    if (
        inputs.get("mm_encoder_outputs")
        and inputs.get("position_ids") is not None
        and inputs.get("attention_mask") is None
        and _cache_of(inputs) is None
    ):  # generate(use_cache=False) leaves out a mask of ones: see `_shorten`
        return (), inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
    return None


def _after_forward(model: VisionLanguageModel, args: object, kwargs: object, output: Any) -> None:
    """Note in the cache which columns of the prompt it holds."""
    columns = require_image_tokens(model, _CALLER).probe.columns
    cache = next((getattr(output, name, None) for name in _CACHES if hasattr(output, name)), None)
    if columns is not None and cache is not None:
        setattr(cache, _ATTRIBUTE, columns)


def _continued(model: VisionLanguageModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Add positions of the full prompt to inputs that follow on a cache of a shortened one."""
    record = _record_of(inputs)
    input_ids: Tensor | None = inputs.get("input_ids")
    if record is None or input_ids is None:
        raise ValueError("cropr: a model with pruned image tokens goes on with input_ids (B, L)")
    count = input_ids.shape[1]
    num_cached = int(_cache_of(inputs).get_seq_length())
    after = num_cached - record.index.shape[1]  # columns since the prompt
    columns = record.extended(after + count)
    mask: Tensor | None = inputs.get("attention_mask")
    deltas: Tensor | None = getattr(model.base_model, "rope_deltas", None)
    if mask is not None and mask.shape[1] == columns.num_columns and deltas is not None:
        positions = (mask.long().cumsum(1) - 1)[:, -count:] + deltas.to(mask.device)
        positions = positions.expand(3, -1, -1)
    else:
        plain = {name: value for name, value in inputs.items() if name != "attention_mask"}
        positions = _positions_of(model, plain)
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
    if kwargs.get("pixel_values") is None and _record_of(kwargs) is None:
        return base_generate(None, *args, **kwargs)
    full_ids = kwargs.get("input_ids")
    if args or not isinstance(full_ids, Tensor):
        raise ValueError("cropr: generate with images takes input_ids, and all others by name")
    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = _inferred_mask(model, full_ids)
    positions = kwargs.get("position_ids")
    if positions is None:
        named = {name: value for name, value in kwargs.items() if name != "input_ids"}
        positions = model._prepare_position_ids_for_generation(full_ids, named)
    shortened, columns = _shorten(model, kwargs, positions, pad_left=True)
    if columns is None:
        return base_generate(**shortened)
    dropped = columns.num_columns - columns.index.shape[1]
    _shift_lengths(shortened, dropped)
    output = base_generate(**shortened)
    sequences = output if isinstance(output, Tensor) else output.sequences
    answers = sequences[:, columns.index.shape[1] :]
    times = len(sequences) // len(full_ids)
    prompts = full_ids.repeat_interleave(times, 0).to(sequences.device)
    sequences = torch.cat([prompts, answers], 1)
    for cache in (_cache_of(kwargs), *(getattr(output, name, None) for name in _CACHES)):
        if cache is not None and times == 1:
            setattr(cache, _ATTRIBUTE, columns)
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
