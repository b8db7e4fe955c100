"""apply, remove, set_rate, deploy: put Cropr into a model that exists, in place, and take it out again."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import schedule as schedules
from ..models.adapters import Anatomy, anatomy, fuse_blocks, take_apart
from .block_wrapper import Passage, PrunedWithin, connect, disconnect
from .engine import Graphs
from .merging import Merge
from .model import CroprModules, Pruned, require_pruned
from .module import Cropr, FoldedCropr
from .windows import Windows

_pruned_classes: dict[type, type] = {}


def _pruned_class(base: type, mixin: type) -> type:
    if base not in _pruned_classes:
        _pruned_classes[base] = type(f"Cropr{base.__name__}", (mixin, base), {"__module__": __name__})
    return _pruned_classes[base]


def apply(
    model: Any,
    *,
    rate: int | None = None,
    keep: Sequence[int] | str | Path | None = None,
    ratio: float | None = None,
    llf: bool = False,
    const: tuple[int, int] | None = None,
    merge: bool | Merge = False,
    windows: Windows | None = None,
    img_size: tuple[int, int] | None = None,
    num_queries: int = 1,
    num_outputs: int | None = None,
    mlp_ratio: float = 4.0,
    num_heads: int | None = None,
    stop_gradient: bool = True,
    sampling: bool = False,
) -> Any:
    """Put Cropr modules between the blocks of a model, in place.

    The backbone's parameters, names and weights stay as they are; `model.cropr` is added, one module per pruned
    block. Afterwards model(images) returns (output, auxiliary predictions) in training and the output in eval.

    A transformers or torchvision model keeps its own forward, and all its outputs; with `llf` its last_hidden_state has
    every token in the original order, without it those that stayed.

    Args:
        model: `cropr_kernels.models.vit.ViT`, timm VisionTransformer or Eva; transformers ViT, ViT-MAE, DINOv2 (with
            registers), DINOv3, SigLIP or CLIP vision; torchvision VisionTransformer.
        rate, keep, ratio, const: the schedule; exactly one, see `cropr_kernels.schedule`. keep may be a file that
            `cropr tune` wrote.
        llf: Last Layer Fusion: all tokens return before the last block.
        merge: tokens that leave merge into those that stay, instead of being lost: best for a model that was not
            trained to be pruned. Outputs cover all positions: a merged token is copied to all that it stands for. A
            `Merge` says how; True is `Merge()`.
        windows: window attention; every window drops equally many, so schedules count the tokens of one window. Needs
            llf. The class token and registers are left out, and the model gives features (B, patches, D) only.
        img_size: height and width in pixels that the schedule is for; default the model's own. Other sizes still run.
        num_queries: M, 1 for classification, one per patch for dense tasks (with windows: per patch of a window).
        num_outputs: width of the auxiliary predictions; default the model's classes; 0 for none.
        mlp_ratio, num_heads, stop_gradient, sampling: options of `Cropr`.

    Returns:
        The same model.

    Raises:
        TypeError: the model's family is not known.
        ValueError: the model is pruned already, the schedule does not fit it, tokens shall merge in blocks whose
            attention cannot weigh them, or windows come without llf, with merge, or for a model that runs its blocks
            itself.
    """
    if isinstance(model, Pruned | PrunedWithin):
        raise ValueError(
            "cropr.apply: the model is pruned already; cropr.set_rate changes the rate, cropr.remove undoes"
        )
    known = anatomy(model)
    if known.hosted and (merge or windows):
        raise ValueError(
            f"cropr.apply: {type(model).__name__} runs its blocks itself: merge and windows are for timm models and "
            "cropr_kernels.models.vit.ViT"
        )
    if windows is not None and (not llf or merge):
        raise ValueError("cropr.apply: windows need llf=True, so that the map is whole again, and do not merge")
    schedule = schedules.resolve(rate=rate, keep=keep, ratio=ratio, const=const)
    depth = len(known.blocks)
    count = schedules.num_modules(depth, llf)
    outputs = known.num_classes if num_outputs is None else num_outputs
    options: dict[str, Any] = dict(num_heads=num_heads, stop_gradient=stop_gradient, sampling=sampling)
    modules = [Cropr(known.dim, outputs, num_queries, mlp_ratio, **options) for _ in range(count)]
    merging = (merge if isinstance(merge, Merge) else Merge()) if merge else None
    apart = take_apart(model) if not known.hosted else None
    if merging is not None and isinstance(apart, str):
        raise ValueError(f"cropr.apply: merge needs attention that weighs tokens: {apart}")
    patch = known.patch_size
    grid = known.grid if img_size is None else (img_size[0] // patch[0], img_size[1] // patch[1])
    stack = CroprModules(modules, schedule, llf, grid, merging, windows)
    stack.apart = stack.apart if apart is None else apart
    schedule(*_default_tokens(known, stack), llf)  # refuse now what could only fail later
    model.cropr = stack.to(next(model.parameters()).device).train(model.training)
    if llf:
        # All tokens meet again in the last block: dropping it for some images would drop the fusion.
        for module in known.blocks[-1].modules():
            if getattr(module, "drop_prob", 0.0):
                _override(stack, module, "drop_prob", 0.0)
    if windows is not None:
        for block in known.blocks:  # rotary positions start at the first token now
            for name in ("num_prefix", "num_prefix_tokens"):
                if hasattr(block.attn, name):
                    _override(stack, block.attn, name, 0)
    if known.hosted:
        stack.passage = Passage(stack, depth, known.num_prefix)
        connect(known.blocks, stack.passage)
    model.__class__ = _pruned_class(type(model), PrunedWithin if known.hosted else Pruned)
    return model


def _override(stack: CroprModules, module: Any, name: str, value: Any) -> None:
    stack.overridden.append((module, name, getattr(module, name)))
    setattr(module, name, value)


def _default_tokens(known: Anatomy, stack: CroprModules) -> tuple[int, int, int]:
    """Tokens in a row of the batch at the image size of apply, blocks, and prefix tokens: what schedules take."""
    depth = len(known.blocks)
    if stack.windows is not None:
        return stack.windows.size**2, depth, 0
    height, width = stack.grid
    return known.num_prefix + height * width, depth, known.num_prefix


def remove(model: Any) -> Any:
    """Undo `apply` in place: class, parameters and stochastic depth are those of before.

    Raises:
        TypeError: the model is not pruned.
    """
    stack = require_pruned(model, "cropr.remove")
    for module, name, value in stack.overridden:
        setattr(module, name, value)
    if stack.passage is not None:
        disconnect(anatomy(model).blocks)
    del model.cropr
    model.__class__ = type(model).__mro__[2]
    return model


def set_rate(model: Any, rate: int) -> Any:
    """Prune with another constant rate from now on, in place: one model serves many rates.

    Raises:
        TypeError: the model is not pruned.
        ValueError: the rate drops more tokens than there are at the image size given to apply.
    """
    stack = require_pruned(model, "cropr.set_rate")
    schedule = schedules.resolve(rate=rate)
    schedule(*_default_tokens(anatomy(model), stack), stack.llf)
    stack.schedule = schedule
    return model


def set_progress(model: Any, share: float) -> Any:
    """Prune only this share of what the schedule prunes, in place: the curriculum of a training run.

    Args:
        model: pruned by `apply`.
        share: from 0, nothing, to 1, all.

    Raises:
        TypeError: the model is not pruned.
        ValueError: share is outside [0, 1].
    """
    stack = require_pruned(model, "cropr.set_progress")
    stack.schedule = stack.schedule.at(share)
    return model


def deploy(model: Any, *, engine: bool = True, cuda_graphs: int = 0) -> Any:
    """Return a copy for inference: eval, frozen, auxiliary parts gone, M queries folded into one per layer.

    The argument stays as it was. A rate of 0 gives the unpruned model on the same engine.

    Args:
        model: pruned by `apply`.
        engine: run the blocks on the zero-copy engine (`pruning.engine`) where it knows them; the logits are then
            those of model.eval() up to rounding. Blocks it does not know use the functional ops; `cropr info MODEL`
            and the repr of `model.cropr` say so and why. False: functional ops, logits of model.eval() bit for bit.
            Inputs that require a gradient, and `pruning_map`, take the functional ops too.
        cuda_graphs: capture forward in a CUDA graph per (shape, schedule, precision), at most so many at a time, and
            replay it; 0 for none. Each graph holds the memory of one forward. CPU inputs, inputs that require a
            gradient and torch.compile ignore it.

    Raises:
        TypeError: the model is not pruned.
        ValueError: cuda_graphs is negative, or the model runs its blocks itself.
    """
    stack = require_pruned(model, "cropr.deploy")
    if cuda_graphs < 0:
        raise ValueError(f"cropr.deploy: cuda_graphs must be >= 0, got {cuda_graphs}")
    if cuda_graphs and stack.passage is not None:
        raise ValueError(f"cropr.deploy: cuda_graphs cannot capture {type(model).__name__}; use torch.compile")
    folded = [FoldedCropr(module) if isinstance(module, Cropr) else copy.deepcopy(module) for module in stack]
    light = CroprModules(folded, stack.schedule, stack.llf, stack.grid, windows=stack.windows)
    deployed = copy.deepcopy(model, memo={id(stack): light})  # the copy takes `light` wherever the model has `stack`
    light.merging = stack.merging
    if stack.passage is None:
        light.apart = take_apart(deployed)
    if stack.passage is not None:
        light.passage = anatomy(deployed).blocks[0].cropr_passage[0]
        light.engine = "the model runs its blocks itself"
    elif stack.windows is not None:
        light.engine = "window attention"
    else:
        light.engine = fuse_blocks(deployed) if engine else "switched off by deploy(engine=False)"
    light.graphs = Graphs(cuda_graphs) if cuda_graphs else None
    return deployed.eval().requires_grad_(False)
