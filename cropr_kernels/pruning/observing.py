"""Patches after each block of the unpruned model, and the attention that they receive."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..importance import (
    AttentionInputs,
    attention_prefix_first,
    importance,
    importance_of_windows,
    map_importance,
)
from ..models.tiling import Tiling
from .model import CroprModules, modules_of, run
from .state import PruningOptions


def observe_blocks(
    model: nn.Module, images: Tensor, kwargs: Mapping[str, object]
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the unpruned model, and return the patches (B, patches, D) after each block and the
    `importance` (B, patches) that it gives them.

    That of the first of blocks over maps is zero.

    Raises:
        ValueError: a block does not attend once, or over other tokens than it takes.
    """
    modules = modules_of(model)
    spec = modules.spec
    tiling = _tiling_of(modules, images)
    if spec.map_blocks is None or tiling is None:
        tokens, importances = _observe_tokens(model, modules, images, kwargs)
        if tiling is not None:
            importances = [importance_of_windows(values, tiling) for values in importances]
    else:
        tokens = []
        options = PruningOptions(observe=lambda layer, x: tokens.append(x))
        run(model, lambda: spec.run(images, **kwargs), options)
        importances = [tokens[0].new_zeros(tokens[0].shape[:2])]
        importances += [
            torch.cat([map_importance(block, image, tiling) for image in x.split(1)])
            for block, x in zip(spec.map_blocks[1:], tokens)
        ]
    counts = {(len(x), x.shape[1]) for x in (*tokens, *importances)}
    if len(counts) > 1:
        raise ValueError(
            "cropr.calibrate: every block must attend over the tokens it takes, got attention "
            f"over {sorted(counts)} (rows, patches)"
        )
    return tokens, importances


def _observe_tokens(
    model: nn.Module, modules: CroprModules, images: Tensor, kwargs: Mapping[str, object]
) -> tuple[list[Tensor], list[Tensor]]:
    """`observe_blocks` of blocks that take tokens (B, N, D), by their calls of attention; if they
    have windows, the rows are these."""
    spec = modules.spec
    has_windows = modules.config.windows is not None
    # With windows there is no prefix, and no head
    prefix = 0 if has_windows else spec.num_prefix
    owner: Any = model
    call = partial(owner.forward_features if has_windows else spec.run, images, **kwargs)
    tokens: list[Tensor] = []
    importances: list[Tensor] = []
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with AttentionInputs() as attention:

        def observe(layer: int, x: Tensor) -> None:
            if len(attention.inputs) != 1:
                raise ValueError(
                    f"cropr.calibrate: block {layer} must attend once "
                    "(scaled_dot_product_attention, or a softmax over "
                    f"(B, heads, N, N)), attended {len(attention.inputs)} times"
                )
            inputs = attention_prefix_first(attention.inputs[0], spec.token_format)
            tokens.append(x[:, prefix:])
            class_token = spec.class_token and not has_windows
            importances.append(importance(inputs, prefix, class_token=class_token))
            attention.inputs.clear()  # a softmax of `importance` may be among them

        handle = spec.blocks[0].register_forward_pre_hook(
            lambda block, args: attention.inputs.clear()
        )
        torch.backends.mha.set_fastpath_enabled(False)  # it would compute the attention elsewhere
        try:
            run(model, call, PruningOptions(observe=observe))
        finally:
            handle.remove()
            torch.backends.mha.set_fastpath_enabled(fast_path)
    return tokens, importances


def windows_of(modules: CroprModules, images: Tensor) -> list[Tensor | slice]:
    """Indices (windows, patches) of the patches between which a model chooses, for windows of each
    shape."""
    tiling = _tiling_of(modules, images)
    return [slice(None)] if tiling is None else [group.cells for group in tiling.groups]


def _tiling_of(modules: CroprModules, images: Tensor) -> Tiling | None:
    """The windows of a model, or the full map of one over maps; None if it has neither."""
    windows = modules.config.windows
    spec = modules.spec
    if windows is None and spec.map_blocks is None:
        return None
    height, width = images.shape[-2:]
    window = spec.window if windows is None else windows.size
    return Tiling(spec.grid_of((height, width)), window, images.device)
