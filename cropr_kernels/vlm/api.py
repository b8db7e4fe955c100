"""prune_image_tokens: fewer image tokens into the language model of a vision-language model."""

import inspect
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from ..pruning.merging import Merge
from ..schedule import Schedule
from .answers import install_answers, remove_answers, takes_features
from .choice import Keep, checked_keep, num_kept
from .dense import PrunedTower, find_pruned
from .features import VisionLanguageModel, language_model
from .generation import after_forward, before_forward, generate
from .packed import PackedTower, find_tower
from .pooled import pooled_side, pooled_tower
from .shortening import end_at_decoder
from .tokens import ATTRIBUTE, CALLER, ImageTokens, require_image_tokens
from .towers import GroupTower

Model = TypeVar("Model", bound=nn.Module)


def prune_image_tokens(
    model: Model,
    keep: Keep = 1.0,
    *,
    query: Tensor | None = None,
    tower: Schedule | None = None,
    merge: bool | Merge = False,
) -> Model:
    """Let the language model of a vision-language model see fewer image tokens, in place.

    Other placeholders leave the prompt, masks, labels and token types; kept tokens keep their
    positions. Logits are those of the shortened prompt, `generate` returns the
    full one.

    Args:
        model: of transformers 5.2 or newer, with `get_image_features`.
        keep: int >= 1, tokens an image, tile or frame keeps; float in (0, 1], their share,
            rounded up. 1.0: all that the tower has left.
        query: (D,), D the width of the language model: of equal runs each keeps the token of the
            highest product. None: that in the middle.
        tower: also prune, inside a tower that packs images or is pooled, groups of patches that
            become one token, of each image.
        merge: they merge into others, as in `apply`. Not with flash attention.

    Returns:
        The same model.

    Raises:
        TypeError: the model cannot be pruned so; the message is the reason.
        ValueError: an option is out of range, or tokens are pruned already.
    """
    if hasattr(model, ATTRIBUTE):
        raise ValueError(f"{CALLER}: image tokens are pruned already; set model.{ATTRIBUTE}.keep")
    keep = checked_keep(keep)
    if merge and tower is None:
        raise ValueError(f"{CALLER}: merge is of tower, got merge={merge} and tower=None")
    _require_supported(model)
    decoder = language_model(model)
    width = _width(model)
    if query is not None and tuple(query.shape) != (width,):
        raise ValueError(f"{CALLER}: query must be ({width},), got {tuple(query.shape)}")
    groups = None if tower is None else _tower_of(model, tower, merge)
    tokens = ImageTokens(keep, None if query is None else query.detach().float(), groups)
    pruned = find_pruned(model)
    if pruned is not None:
        tokens.dense = PrunedTower(pruned, model.base_model)
    setattr(model, ATTRIBUTE, tokens)
    tokens.hooks = [
        model.register_forward_pre_hook(before_forward, with_kwargs=True),
        model.register_forward_hook(after_forward, with_kwargs=True, always_call=True),
        decoder.register_forward_pre_hook(partial(end_at_decoder, tokens), with_kwargs=True),
    ]
    if not takes_features(model):
        install_answers(model, tokens)
    model.generate = partial(generate, model)  # type: ignore[assignment]
    return model


def restore_image_tokens(model: Model) -> Model:
    """Undo `prune_image_tokens`, in place.

    Raises:
        TypeError: image tokens are not pruned.
    """
    tokens = require_image_tokens(model, "cropr.restore_image_tokens")
    for part in (tokens, tokens.tower):
        for hook in () if part is None else part.hooks:
            hook.remove()
    if tokens.dense is not None:
        tokens.dense.remove(model.base_model)
    remove_answers(model)
    delattr(model, ATTRIBUTE)
    del model.generate
    return model


def num_image_tokens(model: nn.Module, count: int) -> int:
    """Count the tokens that an image, tile or frame of `count` placeholders keeps.

    Raises:
        TypeError: image tokens are not pruned.
    """
    tokens = require_image_tokens(model, "cropr.num_image_tokens")
    kept = num_kept(tokens.keep, count)
    if tokens.tower is not None:
        return min(kept, tokens.tower.num_kept(count))
    dense = tokens.dense
    is_pooled = pooled_side(model.config) is not None
    if dense is None or is_pooled or (dense.fuses and kept < count):
        return kept
    return min(kept, dense.num_kept(count))


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
        missing = [name for name in ("position_ids", "attention_mask") if name not in names]
        if missing:
            reason = f"its forward takes no {missing[0]}"
        elif not hasattr(model, "_prepare_position_ids_for_generation"):
            reason = (
                "generate of transformers before 5.2 repeats the last of the positions that it "
                "is given; install 5.2 or newer"
            )
    if reason:
        raise TypeError(f"{CALLER}: {type(model).__name__} cannot be pruned: {reason}")


def _tower_of(model: VisionLanguageModel, schedule: Schedule, merge: bool | Merge) -> GroupTower:
    """Prune inside the tower of a model, by groups."""
    merging = merge if isinstance(merge, Merge) else Merge() if merge else None
    packed = find_tower(model)
    if packed is not None:
        return PackedTower(packed, schedule, merging)
    tower = pooled_tower(model, schedule, merging)
    if tower is None:
        raise TypeError(
            f"{CALLER}: tower is for models whose tokens are groups of patches, and "
            f"{type(model).__name__} is none; prune its tower by cropr.apply"
        )
    return tower


def _width(model: VisionLanguageModel) -> int:
    return int(model.get_input_embeddings().weight.shape[1])
