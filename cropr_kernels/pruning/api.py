"""apply, remove, set_rate, deploy: put Cropr into a model that exists, in place, and take it out again."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..models.adapters import EngineRefusal, engine_parts, find_spec
from ..schedule import Schedule, num_modules
from .block_wrapper import unwrap, wrap
from .config import PruningConfig
from .fusion import Fusion, Restore
from .graphs import CAPACITY, PATCHES, PATIENCE, GraphedForward, Graphs
from .merging import Merge
from .model import (
    CroprModules,
    after_forward,
    before_forward,
    fill_padding,
    forward_intermediates,
    is_pruned,
    keep_grid,
    require_pruned,
    warn_of_random_queries,
)
from .module import Cropr, FoldedCropr, Scorer
from .windows import Windows


def apply(
    model: Any,
    *,
    rate: int | None = None,
    keep: Sequence[int] | str | Path | None = None,
    ratio: float | None = None,
    const: tuple[int, int] | None = None,
    llf: bool | Restore | Fusion = False,
    merge: bool | Merge = False,
    windows: Windows | None = None,
    img_size: tuple[int, int] | None = None,
    num_queries: int = 1,
    num_outputs: int | None = None,
    make_module: Callable[[int, nn.Module], Scorer] | None = None,
) -> Any:
    """Put Cropr modules between the blocks of a model, in place.

    The model keeps its class, its forward, its parameters and all its outputs; `model.cropr` is added, one module per
    pruned block. Afterwards model(images) returns (output, auxiliary predictions) in training, where there are any (of
    transformers with labels: its own output, with their losses in its loss), and the output in eval. It
    takes two masks more, (B, grid height, grid width) bool: `protect`, patches that are kept while anything else
    can be pruned (`protect_boxes`; where more are protected than may be kept their scores decide), and `padding`,
    patches that are none (`pad_images`: they are pruned first, and neither tokens nor the head see them; each image
    needs a token that is no padding).

    With `llf` the tokens after the last block are all tokens in their original order, without it those kept.

    Args:
        model: `cropr_kernels.ViT`; timm VisionTransformer or Eva; transformers ViT, ViT-MAE, DINOv2 (with registers),
            DINOv3, SigLIP or CLIP vision; torchvision VisionTransformer.
        rate, keep, ratio, const: the schedule; exactly one, see `Schedule`. keep may be a file that
            `cropr tune` wrote.
        llf: Last Layer Fusion: all tokens are restored before the last block; "left", as published, or "host", with
            what changed since. A `Fusion` says more; True is `Fusion()`.
        merge: pruned tokens merge into kept ones, instead of being lost: best for a model that was not trained to be
            pruned. Outputs cover all positions: a merged token is copied to all that it stands for. A `Merge` says how;
            True is `Merge()`.
        windows: window attention; every window prunes equally many, so schedules count the tokens of one window. Needs
            llf. The class token and registers are left out, and the model gives features (B, patches, D) only.
        img_size: height and width in pixels that the schedule is for; default the model's own. Other sizes still run.
        num_queries: M, 1 for classification, one per patch for dense tasks (with windows: per patch of a window).
        num_outputs: width of the auxiliary predictions; 0 for none: the queries then do not learn, and the model gives
            its plain output in training too. Default: the model's classes, with heads that are made when the model is
            first in training mode, so that one which is only calibrated has none. Call train() before you make the
            optimizer, or DDP: an optimizer that holds the queries but not their heads is refused at its first step.
        make_module: called as make_module(layer, block) for what stands after each pruned block in place of `Cropr`:
            any module with the methods of `Scorer`.

    Returns:
        The same model.

    Raises:
        TypeError: the model's family is not known.
        ValueError: the model is pruned already, the schedule does not fit it, tokens shall merge by modules that have
            no query, or windows come without llf, with merge, or for a model that gives its tokens in no other way
            than through its head.
    """
    if is_pruned(model):
        raise ValueError(
            "cropr.apply: the model is pruned already; cropr.set_rate changes the rate, cropr.remove undoes"
        )
    spec = find_spec(model)
    if windows is not None and merge:
        raise ValueError("cropr.apply: windows do not merge")
    if windows is not None and not hasattr(model, "forward_features"):
        raise ValueError(f"cropr.apply: windows are for timm models and cropr_kernels.ViT, got {type(model).__name__}")
    fusion = Fusion.of(llf)
    if fusion is not None and merge:
        fusion = fusion.by_default("host")
    config = PruningConfig(
        Schedule(rate, keep, ratio, const),
        fusion,
        (merge if isinstance(merge, Merge) else Merge()) if merge else None,
        windows,
        spec.grid if img_size is None else (img_size[0] // spec.patch_size[0], img_size[1] // spec.patch_size[1]),
    )
    _require_map(config, model, spec, "cropr.apply")
    _counts(config, spec)  # refuse now what could only fail later
    later = spec.num_classes if num_outputs is None and make_module is None else 0
    outputs = num_outputs or 0
    if make_module is None:
        make_module = lambda layer, block: Cropr(spec.dim, outputs, num_queries)  # noqa: E731
    count = num_modules(len(spec.blocks), config.whole_blocks)
    modules: list[Any] = [make_module(layer, spec.blocks[layer]) for layer in range(count)]
    stack = CroprModules(modules, config, spec, later)
    if config.merge is not None and not selects_by_query(stack):
        raise ValueError(f"cropr.apply: merge selects by queries, and {type(modules[0]).__name__} does not")
    own = next((p for p in spec.blocks[0].parameters() if p.is_floating_point() and not p.is_meta), None)
    if own is not None:
        stack.to(own.device, own.dtype)
    model.cropr = stack.train(model.training)
    _replace_attributes(model, stack)
    stack.hooks = [
        model.register_forward_pre_hook(before_forward, with_kwargs=True),
        model.register_forward_hook(after_forward, with_kwargs=True, always_call=True),
        spec.projection.register_forward_hook(partial(keep_grid, stack)),
    ]
    if spec.pooling == "average":
        stack.hooks.append(spec.norm.register_forward_hook(partial(fill_padding, stack)))
    wrap(spec.blocks, stack)
    _note(model)
    return model


def options_of(stack: CroprModules) -> dict[str, Any] | None:
    """The options with which `apply` makes such modules, as plain values; None where only others know how."""
    first, config = stack[0], stack.config
    if type(first) not in (Cropr, FoldedCropr):  # a class of its own scores in its own way
        return None
    grid, patch, head = config.grid, stack.spec.patch_size, getattr(first, "aggregator", None)
    if head and (head.mlp is None or head.mlp[0].out_features != 4 * stack.spec.dim):
        return None
    return {
        **{name: own for name, own in asdict(config.schedule).items() if own is not None and name != "share"},
        "llf": asdict(config.llf) if config.llf else False,
        "merge": config.merge and asdict(config.merge),
        "windows": config.windows and asdict(config.windows),
        "img_size": [grid[0] * patch[0], grid[1] * patch[1]],
        "num_queries": len(first.queries) if isinstance(first, Cropr) else 1,
        "num_outputs": None if stack.later else head.head.out_features if head else 0,
    }


def apply_options(model: Any, options: dict[str, Any]) -> Any:
    """`apply` with what `options_of` gave."""
    merge, windows, llf = options.get("merge"), options.get("windows"), options.get("llf")
    made = {
        "llf": "left" if llf is True else Fusion.of(llf) or False,  # True: by versions that knew no other
        "merge": Merge(**merge) if merge else False,
        "windows": Windows(windows["size"], tuple(windows["global_blocks"])) if windows else None,
    }
    return apply(model, **options | made)


def _note(model: Any) -> None:
    """Tell the configuration of a model of transformers how it is pruned: save_pretrained writes it."""
    options = options_of(model.cropr)
    if options is not None and hasattr(getattr(model, "config", None), "save_pretrained"):
        model.config.cropr = options


def _replace_attributes(model: Any, stack: CroprModules) -> None:
    """What a pruned model does in another way."""
    spec, config = stack.spec, stack.config
    _keep_last_blocks(stack)
    if config.windows is not None:
        for block in spec.blocks:  # rotary positions start at the first token now
            for name in ("num_prefix", "num_prefix_tokens"):
                if hasattr(block.attn, name):
                    _replace(stack, block.attn, name, 0)
    if hasattr(model, "set_grad_checkpointing"):  # around the block alone: what is pruned is decided once
        stack.recompute = bool(model.grad_checkpointing)
        _replace(stack, model, "grad_checkpointing", False)
        _replace(stack, model, "set_grad_checkpointing", partial(_set_recompute, stack))
    if hasattr(model, "forward_intermediates"):
        _replace(stack, model, "forward_intermediates", partial(forward_intermediates, model))


def _keep_last_blocks(stack: CroprModules) -> None:
    """All tokens meet again in the last blocks: dropping one for some images would drop the fusion."""
    blocks = stack.spec.blocks
    for block in blocks[len(blocks) - stack.config.whole_blocks :]:
        for module in block.modules():
            if getattr(module, "drop_prob", 0.0):
                _replace(stack, module, "drop_prob", 0.0)


def _require_map(config: PruningConfig, model: Any, spec: Any, caller: str) -> None:
    if config.windows is not None and config.llf is None:
        raise ValueError(f"{caller}: windows need llf=True, so that the map is whole again")
    if spec.needs_map and config.llf is None and config.merge is None:
        raise ValueError(f"{caller}: {type(model).__name__} needs the whole map: cropr.apply(..., llf=True)")


def _set_recompute(stack: CroprModules, enable: bool = True) -> None:
    stack.recompute = enable


def _replace(stack: CroprModules, module: Any, name: str, value: Any) -> None:
    stack.replaced.append((module, name, vars(module).get(name, _Absent)))
    setattr(module, name, value)


class _Absent:
    """Stands for an attribute that was its class's."""


def _counts(config: PruningConfig, spec: Any) -> list[int]:
    """Kept tokens after each module at the image size of apply."""
    return config.counts(spec.num_prefix + config.grid[0] * config.grid[1], len(spec.blocks), spec.num_prefix)


def remove(model: Any) -> Any:
    """Undo `apply` in place: classes, hooks, parameters and stochastic depth are those of before.

    Raises:
        TypeError: the model is not pruned.
    """
    stack = require_pruned(model, "cropr.remove")
    for module, name, value in reversed(stack.replaced):
        if value is _Absent:
            delattr(module, name)
        else:
            setattr(module, name, value)
    if hasattr(model, "set_grad_checkpointing"):
        model.grad_checkpointing = stack.recompute
    if GraphedForward.of(model) is not None:
        del model.forward
    for hook in stack.hooks:
        hook.remove()
    unwrap(stack.spec.blocks)
    del model.cropr
    if hasattr(getattr(model, "config", None), "cropr"):
        del model.config.cropr
    return model


def selects_by_query(stack: CroprModules) -> bool:
    """Whether every module keeps the tokens with the highest product with its query, which is all the engine knows."""
    return all(type(module).forward is Scorer.forward for module in stack)


def set_rate(model: Any, rate: int) -> Any:
    """Prune with another constant rate from now on, in place: one model serves many rates.

    Raises:
        TypeError: the model is not pruned.
        ValueError: the rate drops more tokens than there are at the image size given to apply.
    """
    stack = require_pruned(model, "cropr.set_rate")
    config = replace(stack.config, schedule=Schedule(rate=rate))
    _counts(config, stack.spec)
    stack.config = config
    _note(model)
    if isinstance(stack[0], FoldedCropr):
        warn_of_random_queries(model, "cropr.set_rate")
    return model


def set_llf(model: Any, llf: bool | Restore | Fusion) -> Any:
    """Restore pruned tokens in another way from now on, in place, or not at all: as `apply` takes it.

    Raises:
        TypeError: the model is not pruned.
        ValueError: it lacks modules that it would need, as one that was pruned with fusion over more blocks does; or it
            needs the whole map.
    """
    stack, fusion = require_pruned(model, "cropr.set_llf"), Fusion.of(llf)
    if fusion is not None:
        fusion = fusion.by_default("host" if stack.config.merge is not None or stack.calibrated else "left")
    config = replace(stack.config, llf=fusion)
    _require_map(config, model, stack.spec, "cropr.set_llf")
    needed = num_modules(len(stack.spec.blocks), config.whole_blocks)
    if needed > len(stack):
        raise ValueError(
            f"cropr.set_llf: llf={llf!r} needs {needed} modules, and the model has {len(stack)}; cropr.remove it and "
            "apply anew"
        )
    _counts(config, stack.spec)
    stack.config = config
    _keep_last_blocks(stack)
    _note(model)
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
    stack.config = replace(stack.config, schedule=replace(stack.config.schedule, share=share))
    return model


def deploy(model: Any, *, engine: bool = True, cuda_graphs: int | None = None) -> Any:
    """Return a copy for inference: eval, frozen, auxiliary parts gone, M queries folded into one per layer.

    The argument stays as it was. A rate of 0 gives the unpruned model on the same engine. Warns, once a model, where
    the queries were neither trained, calibrated nor loaded, as `pruning_map`, `merge_map`, `agreement` and `export` do.

    Args:
        model: pruned by `apply`.
        engine: run the blocks on the zero-copy engine (`pruning.engine`) where it knows them; the logits are then
            those of model.eval() up to rounding. Blocks it does not know use the functional ops; `cropr info MODEL`
            and the repr of `model.cropr` say so and why. False: functional ops, logits of model.eval() bit for bit.
            Inputs that require a gradient, and `pruning_map`, take the functional ops too.
        cuda_graphs: how many CUDA graphs of forward there may be at a time; 0 for none. One is captured at the first
            call for each shape, schedule and precision, and replayed; together they hold the memory of one forward.
            Default: 8, of batches of up to 4096 patches, above which launches do not count. There are none for CPU
            inputs and inputs that require a gradient, in training mode, under torch.compile, in transforms and other
            graphs, and where modules have hooks or outputs of several blocks are asked for.

    Raises:
        TypeError: the model is not pruned.
        ValueError: cuda_graphs is negative.
    """
    require_pruned(model, "cropr.deploy")
    warn_of_random_queries(model, "cropr.deploy")
    deployed = deployed_copy(model, engine=engine, cuda_graphs=cuda_graphs)
    deployed.cropr.warned = model.cropr.warned
    return deployed


def deployed_copy(model: Any, *, engine: bool = True, cuda_graphs: int | None = 0) -> Any:
    """`deploy` for those who measure time, which does not depend on the queries: nothing is said of random ones."""
    if cuda_graphs is not None and cuda_graphs < 0:
        raise ValueError(f"cropr.deploy: cuda_graphs must be >= 0, got {cuda_graphs}")
    deployed = copy.deepcopy(model)
    light: CroprModules = deployed.cropr
    light.later = 0
    for layer, module in enumerate(light):
        if isinstance(module, Cropr):
            light[layer] = FoldedCropr(module)
    _note(deployed)
    light.engine, light.watched, light.engine_reason = None, [], ""
    try:
        if light.config.windows is not None:
            raise EngineRefusal("window attention")
        if not engine:
            raise EngineRefusal("switched off by deploy(engine=False)")
        if not selects_by_query(light):
            raise EngineRefusal(f"{type(light[0]).__name__} does not select by its query alone")
        light.engine = engine_parts(light.spec)
        light.watched = [one for parts in light.engine for one in parts.watched()]
    except EngineRefusal as refusal:
        light.engine_reason = str(refusal)
    light.graphs, light.warned = None, True
    if GraphedForward.of(deployed) is not None:
        del deployed.forward
    if cuda_graphs != 0 and "forward" not in vars(deployed):  # one that somebody else put there stays as it is
        light.graphs = Graphs(CAPACITY, PATIENCE) if cuda_graphs is None else Graphs(cuda_graphs)
        deployed.forward = GraphedForward(deployed, PATCHES if cuda_graphs is None else math.inf).forward
    return deployed.eval().requires_grad_(False)


def hold_graphs(deployed: Any, count: int) -> None:
    """Let a deployed model with CUDA graphs have so many at a time, as where many schedules are timed in turns."""
    graphs: Graphs | None = deployed.cropr.graphs
    if graphs is not None:
        graphs.capacity = max(graphs.capacity, count)
